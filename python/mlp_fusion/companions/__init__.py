"""What stands beside the FFN while a model is fine-tuned: methods of peft that this project adds to its registry.

peft is imported here, before any of the files: a method's file is imported as soon as peft has been (see
`mlp_fusion._enter_companions`), and must not be found half imported then.
"""

from mlp_fusion.choices import PEFT_NEEDED
from mlp_fusion.errors import InputError

try:
    import peft
except ModuleNotFoundError as error:
    raise InputError("companions are methods of peft, which is missing: pip install 'mlp-fusion[train]'") from error

if tuple(map(int, peft.__version__.split(".")[:2])) < PEFT_NEEDED:
    _wanted = ".".join(map(str, PEFT_NEEDED))
    raise InputError(f"companions need peft {_wanted} or later, this is {peft.__version__}: pip install -U peft")
