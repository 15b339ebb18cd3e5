"""`ScaledActivation`: the scale of fused neurons inside an FFN's activation, whatever the FFN around it looks like."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from mlp_fusion.modules.scaled import Scaled


class ScaledActivation(Scaled):
    """`act(z * before) * behind`: stands in for the activation of an FFN whose projections were narrowed in place.

    It serves FFNs that no module holds by itself, or whose forward pass is not that of `FusedMLP` or `FusedGLU`: names,
    classes and state dicts of the projections stay what they are, and only `scale` is added. It is the slower form:
    nothing is fused.

    The scale lies between the projections, not in them. An adapter on a projection sees, and is merged into, a plain
    layer. (A scale inside the output projection would scale the merged adapter once more.)

    Shapes: z `(..., h)` -> `(..., h)`, in the dtype of z. In a gated FFN z is what the gate projection puts out.

    Examples:
        >>> from mlp_fusion.modules import ScaledActivation
        >>> sizes = torch.tensor([2.0, 1.0, 3.0])
        >>> act = ScaledActivation(torch.nn.GELU(), sizes, "scaled")
        >>> z = torch.randn(5, 3)
        >>> torch.allclose(act(z), torch.nn.functional.gelu(z) * sizes), list(act.state_dict())
        (True, ['scale'])
    """

    def __init__(
        self,
        activation: nn.Module | Callable[[Tensor], Tensor],
        scale: Tensor | None,
        parameterization: str,
        *,
        gated: bool = False,
    ) -> None:
        """Wrap an activation.

        Args:
            activation: elementwise, without parameters of its own.
            scale: `(h,)` cluster sizes; None for ones, and for `folded`.
            parameterization: `scaled`, `split` or `folded`; that of the weights around it.
            gated: whether what it puts out is multiplied by an up projection.

        Raises:
            ValueError: unknown parameterization, a scale where there can be none, or an activation with parameters,
                whose names would change.
        """
        super().__init__(scale, parameterization)
        if isinstance(activation, nn.Module) and activation.state_dict():
            raise ValueError(f"{type(activation).__name__} has weights of its own, whose names would change")
        self.activation = activation
        self._gated = gated

    @property
    def gated(self) -> bool:
        return self._gated

    def forward(self, z: Tensor) -> Tensor:
        before, behind = self._factors()
        hidden = self.activation(z if before is None else (z * before).to(z.dtype))
        return hidden if behind is None else (hidden * behind).to(hidden.dtype)

    def extra_repr(self) -> str:
        return f"parameterization={self.parameterization}, gated={self.gated}"
