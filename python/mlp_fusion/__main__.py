"""`python -m mlp_fusion` is `mlp-fusion`."""

from mlp_fusion.cli import main

main()
