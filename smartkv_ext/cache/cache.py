"""SmartKVCache: the object that a user gives to generate()."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import Cache

from smartkv_ext.gates import Gates
from smartkv_ext.policies import Policy, get_policy
from smartkv_ext.quant import Budget

from . import serialize
from .arrivals import score_arrivals
from .basis import find_key_basis
from .clock import StepClock
from .compress import compress
from .config import MIN_TOKENS, CacheConfig, ModelGeometry, inverse_frequencies
from .layer import SmartKVLayer
from .report import CacheReport, layer_bytes, report
from .turning import fixed_frequencies

LOST = "the step failed and the cache could not be restored: it is empty now"
# A model's config, and what makes it ready. The package's front door sets them: the cache does not know its seat.
model_config: Callable[[torch.nn.Module], Any] | None = None
prepare_model: Callable[[torch.nn.Module], None] | None = None


class SmartKVCache(Cache):
    """A key-value cache that keeps within a byte budget: ``model.generate(**inputs, cache=SmartKVCache(model))``.

    Args:
        config: the model, which is patched if it is not (see ``smartkv_ext.patch``), or its config (``model.config``).
        budget: what the cache may hold, everything counted: a fraction in (0, 1] of the full bf16 cache of the tokens
            seen so far (0.125, "1/8" or "12.5%"), bytes ("64MB", "1GiB"), bits per value ("4bits"), or None: no limit,
            so every token gets the highest tier.
        policy: which tokens matter: a policy (``smartkv_ext.policies``), its name, or a JSON or YAML file that says
            more. "auto" takes gates where some for the model come with the package; ``report()`` says what it took.
        tiers: bit widths that packed tokens may have, of 2, "K3V2" (keys 3, values 2 bits), 3, "K4V3", 4, 8 and
            16; 16 is the model's own dtype. Default: K3V2, K4V3, 4, 8 and 16, and 2 as well under a policy that evicts
            nothing.
        sinks: first tokens of each sequence, never packed.
        min_tokens: a budget that is a fraction never means fewer bytes than those of this many tokens in the model's
            dtype: shorter contexts are simply kept, and 1/8 binds from 8 times as many tokens on.
        window: newest tokens, never packed. It shrinks where it would take more than a quarter of the budget.
        scope: "head": every KV head decides for itself; "layer": a token lives or dies in all heads of a layer;
            "global": in all layers.
        levels: "gaussian" (Lloyd-Max codebook) or "uniform" reconstruction levels at 2, 3 and 4 bits.
        mean_shift: subtract each head's mean key before quantising (exact, and needed by models with key biases),
            turned by RoPE to a key's position where that takes more away.
        precision: "auto", "fp32", "int16" or "int8": of queries and probabilities where they meet codes, see
            ops.decode_attention.
        key_basis: the basis in which keys are held, measured on the model's queries and keys (``gates.KeyBasis``), in
            which their quantisation costs less. True: that of the policy's gates, or of those in the package for the
            model, if there is one; False: none; a folder or hub id of gates that have one.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.
    """

    layers: list[SmartKVLayer]  # type: ignore[assignment]

    def __init__(
        self,
        config: Any,
        budget: float | str | Budget | None = 0.125,
        policy: str | Policy = "auto",
        tiers: Sequence[int | str] | None = None,
        sinks: int = 4,
        window: int = 128,
        scope: str = "head",
        levels: str = "gaussian",
        mean_shift: bool = True,
        precision: str = "auto",
        key_basis: bool | str | Path = True,
        min_tokens: int = MIN_TOKENS,
    ) -> None:
        model, config = config, _config_of(config)
        geometry = ModelGeometry.from_config(config)
        chosen = get_policy(policy).for_model(config)
        self._basis_of = find_key_basis(key_basis, chosen, config)
        self._basis_is_named = not isinstance(key_basis, bool)
        inv_freq = inverse_frequencies(config)
        self.smartkv_config = CacheConfig.create(
            geometry, inv_freq, budget=budget,
            policy=chosen, tiers=tiers, sinks=sinks, window=window, scope=scope, levels=levels, mean_shift=mean_shift,
            precision=precision, key_basis=None if self._basis_of is None else self._basis_of.basis,
            min_tokens=min_tokens,
            turn_freq=fixed_frequencies(config, inv_freq, geometry.head_dim),
        )  # fmt: skip
        num_layers = geometry.num_layers
        self.clock = StepClock(num_layers)
        self._is_recorded = False
        self.open_forward: int | None = None  # tokens seen before the forward that is running, or was interrupted
        super().__init__(layers=[SmartKVLayer(self.smartkv_config, i, self.clock) for i in range(num_layers)])
        if model is not config and prepare_model is not None:  # last: refused arguments leave the model as it was
            prepare_model(model)

    def __repr__(self) -> str:
        config = self.smartkv_config
        tokens = f"{self.layers[0].seen:,} tokens x {max(self.layers[0].batch_size, 1)}"
        return f"SmartKVCache(policy={config.policy.title!r}, budget={config.budget}, {tokens}, {self.nbytes:,} bytes)"

    # -- transformers protocol -------------------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any,
        kwargs: dict[str, Any] | None = None, **more: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Return the new keys and values as they are: the attention function owns append, attend and compress.

        kwargs: from transformers 5.24 on, the keyword arguments that go on to the attention function, which finds the
        cache there.
        """
        from .handover import begin_update  # see there

        begin_update(self, key_states, value_states, layer_idx)
        if kwargs is not None:
            kwargs["smartkv_cache"] = self
        return key_states, value_states

    def activate_past_recording(self) -> None:
        """Assisted decoding: nothing is lost until crop() commits."""
        for layer in self.layers:
            layer.activate_past_recording()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search: row i continues old row beam_idx[i]."""
        for layer in self.layers:
            layer.index_select(beam_idx)

    def crop(self, max_length: int) -> None:
        """Remove the -max_length newest tokens, or keep the first max_length; 0 commits what was recorded."""
        max_length = int(max_length)  # assisted decoding below transformers 5.18 gives a tensor
        for layer in self.layers:  # all or none: layers of different lengths would be silently wrong
            layer.check_crop(max_length if max_length > 0 else layer.seen + max_length)
        for layer in self.layers:
            layer.crop(max_length)
        self._pack_if_due(force_recorded=True)

    def check_even(self) -> None:
        """Before a forward: an interrupt, behind which nothing is called, may have ended the last one anywhere.

        Raises RuntimeError, with the tokens of that forward forgotten, or everything where that cannot be.
        """
        start, self.open_forward = self.open_forward, None
        if start is not None and {layer.seen for layer in self.layers} != {start}:
            self.rollback(start)
            raise RuntimeError(
                f"the last forward was interrupted; the cache is back at {start:,} tokens: give it the new ones again"
            )

    def check_keys(self, sketch: Callable[[], torch.Tensor | None]) -> None:
        """Before a forward of a model with this ``gates.key_sketch``: a model of the same shape that is not the one
        that gates and key basis were measured on gets what a model without them gets.

        Raises ValueError where they were asked for by name.
        """
        self.smartkv_config.policy.check_keys(sketch)
        owner = self._basis_of
        if owner is None or owner.sketch is None or self.layers[0].seen or (found := sketch()) is None:
            return
        try:
            owner.check_sketch(found)
        except ValueError:
            if self._basis_is_named:
                raise
            self.configure(replace(self.smartkv_config, key_basis=None))

    def configure(self, config: CacheConfig, basis_of: Gates | None = None) -> None:
        """Take another configuration, before the first token; ``basis_of``: the gates that its key basis came with."""
        self.smartkv_config, self._basis_of = config, basis_of
        for layer in self.layers:
            layer.config = config

    # -- compression -----------------------------------------------------------------------------------------------

    def after_attention(self, layer_idx: int, softmax_scale: float) -> None:
        """Called by the attention function when a layer has appended and attended: pack what is due."""
        layer = self.layers[layer_idx]
        layer.softmax_scale = softmax_scale
        if layer_idx == len(self.layers) - 1:
            score_arrivals(self.layers)
            self.clock.advance()
        if self.smartkv_config.scope != "global":
            if layer.is_due():
                compress([layer], softmax_scale)
        elif layer_idx == len(self.layers) - 1:
            self._pack_if_due()

    def step_kind(self) -> tuple[bool, ...] | None:
        """What tells the next one-token step, if none of its tokens is padding, from others in more than values on the
        device; None where it packs or allocates. Makes everything ready for it, so that steps of one kind launch the
        same kernels on the same memory: a CUDA graph of one can be replayed for all, each followed by ``follow``.
        """
        kinds = [layer.step_kind() for layer in self.layers]
        if any(kind is None for kind in kinds):
            return None
        for layer in self.layers:
            layer.make_ready()
        return tuple(bool(kind) for kind in kinds)

    def follow(self) -> None:
        """The host's part of a one-token step: a replay has done what happens on the device."""
        self.clock.follow()
        for layer in self.layers:
            layer.follow()

    @property
    def state_mark(self) -> tuple[int, int]:
        """Differs once the cache was cropped, reordered or reset, or has taken in tokens."""
        return sum(layer.rewrites for layer in self.layers), self.layers[0].seen

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Around a step behind ``step_kind`` that is recorded for the device, where nothing happens yet: if it fails,
        what the host has noted of it is taken back."""
        owners = [self.clock, *(part for layer in self.layers for part in (layer, layer.window))]
        noted = [dict(vars(owner)) for owner in owners]
        self._is_recorded = True
        try:
            yield
        except BaseException:
            for owner, values in zip(owners, noted, strict=True):
                vars(owner).clear()
                vars(owner).update(values)
            raise
        finally:
            self._is_recorded = False

    def _pack_if_due(self, force_recorded: bool = False) -> None:
        due = [
            layer
            for layer in self.layers
            if layer.is_initialized
            and (force_recorded or not layer.record_past)
            and layer.window.used >= layer.capacity
        ]
        if not due:
            return
        if self.smartkv_config.scope == "global":
            compress(due, due[0].softmax_scale)
        else:
            for layer in due:
                compress([layer], layer.softmax_scale)

    def rollback(self, length: int) -> None:
        """After a failed forward: forget what the layers before the failing one have already taken in.

        Raises RuntimeError, and empties the cache, where a sliding layer has let go of tokens that it needs.
        """
        if self._is_recorded:
            return  # see there
        try:
            for layer in self.layers:
                layer.check_crop(min(length, layer.seen))
        except ValueError as error:
            self.reset()  # type: ignore[no-untyped-call]
            raise RuntimeError(LOST) from error
        if any(layer.seen < length for layer in self.layers):  # emptied before
            raise RuntimeError(LOST)
        for layer in self.layers:
            if length == 0:  # also one that has only been told a shape
                record_past = layer.record_past
                layer.reset()
                layer.record_past = record_past
            elif layer.seen > length:
                layer.crop(length - layer.seen)

    # -- reading ---------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes held: ``report().total_bytes``, without waiting for the device. 0 before the first token."""
        held = sum(layer_bytes(layer) for layer in self.layers)
        return held + self.clock.nbytes if held else 0

    def report(self) -> CacheReport:
        """Exact bytes by part, and tokens kept per tier."""
        return report(self.layers)

    def save(self, path: str | Path) -> None:
        """Write the whole state to one safetensors file."""
        serialize.save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, config: Any, device: str | torch.device = "cpu") -> SmartKVCache:
        """Read what ``save`` wrote, for the same model. Raises ValueError for a foreign, newer or damaged file."""
        return serialize.load(cls, Path(path), _config_of(config), device)


def _config_of(model: Any) -> Any:
    """The config of a model; anything else is taken for a config."""
    if not isinstance(model, torch.nn.Module):
        return model
    if model_config is None:
        raise TypeError("config may be a model for smartkv_ext.SmartKVCache; here it must be a transformers config")
    return model_config(model)
