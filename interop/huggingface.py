"""Language models as transformers' own: `AutoModelForCausalLM`, `generate`, `Trainer`.

Importing this module (`omnimix.huggingface`) registers the model type "omnimix" with transformers; folders that
`save_pretrained` wrote are then loaded by `AutoConfig` and `AutoModelForCausalLM`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, no_type_check

import torch
from torch import Tensor, nn

from ..backbones.context import Context
from ..backbones.heads import get_objective
from ..backbones.heads.causal import IGNORED
from ..backbones.language import LanguageModel, LanguageModelConfig
from ..backbones.layer import Output
from ..backbones.layout import Layout
from ..backbones.serialization import to_dict
from ..errors import CheckpointError, UnsupportedCall, UnsupportedShape
from ..modalities.common.weights import build_config
from ..modalities.text.text_generator import TextGenerator
from ..utils.private_torch import buffers_outside_state_dict
from .cache import OmnimixCache
from .checked import Checked
from .importing import load_language_model, source_hidden, wanted
from .padding import Rows
from .private_transformers import loaded

wanted("transformers", "omnimix.huggingface", "hf")
with source_hidden():
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        GenerationMixin,
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerFast,
    )
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.utils.import_utils import is_kernels_available

    # The answer is remembered; asked later, transformers could find our folder `kernels` again.
    is_kernels_available()

    from .fast_tokenizer import to_tokenizer

__all__ = ["OmnimixCache", "OmnimixConfig", "OmnimixForCausalLM", "from_run", "to_pretrained", "to_tokenizer"]


# The constructor is transformers', which takes what no field declares; checkers of signatures leave it alone.
@no_type_check
class OmnimixConfig(PretrainedConfig):
    """transformers' configuration around a `LanguageModelConfig`.

    Args:
        omnimix: `omnimix.backbones.to_dict` of a `LanguageModelConfig`. What else transformers wants (vocab_size,
            hidden_size, num_hidden_layers, tie_word_embeddings) is read off it.
        bos_token_id, eos_token_id, pad_token_id: the tokenizer's end token, which begins and ends a document.
    """

    model_type = "omnimix"

    omnimix: dict[str, Any] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = True
    vocab_size: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        # transformers builds a configuration without arguments too, to learn the defaults.
        if self.omnimix is not None:
            config = self.language_model()
            self.vocab_size, self.tie_word_embeddings = config.vocab_size, config.tie_word_embeddings
            self.hidden_size, self.num_hidden_layers = config.backbone.dim, config.backbone.depth
        super().__post_init__(**kwargs)

    def language_model(self) -> LanguageModelConfig:
        """The configuration of the omnimix model.

        Raises:
            CheckpointError: there is none, or it describes no model.
        """
        if not self.omnimix:
            raise CheckpointError("the configuration has no entry 'omnimix', which describes the model")
        return build_config(LanguageModelConfig, self.omnimix, "config.json, omnimix:")


# What transformers calls the cache; until 5.23 past_key_values.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


# Where packed sequences end, by the names of attention kernels.
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def _either(cache: OmnimixCache | None, past_key_values: OmnimixCache | None) -> OmnimixCache | None:
    """The one that is given."""
    if cache is not None and past_key_values is not None:
        raise UnsupportedShape("cache, past_key_values: two names of one argument; pass it once")
    return past_key_values if cache is None else cache


class _Traced:
    """Stands for a model whose pass through the backbone has been made already."""

    def __init__(self, model: LanguageModel, out: Output):
        self.model, self.made = model, out

    def hidden(self, tokens: Tensor, layout: Layout, state: Any = None) -> Output:
        return self.made

    def cross_entropy(self, y: Tensor, targets: Tensor, **options: Any) -> Tensor:
        return self.model.cross_entropy(y, targets, **options)


class OmnimixForCausalLM(Checked, PreTrainedModel, GenerationMixin):
    """A `LanguageModel` with a causal objective as transformers' model.

    Padding, left or right, is dropped before the backbone sees it (the rows are packed), so the answer does not depend
    on it. The omnimix model is the attribute `model`. Whoever trains experts with router="sigmoid" calls their
    `rebalance` after each step, as the recipes do.

    Raises:
        UnsupportedCall: the objective is one of diffusion.
    """

    config_class = OmnimixConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _is_stateful = True
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]

    def __init__(self, config: OmnimixConfig):
        super().__init__(config)
        ours = config.language_model()
        decoder = get_objective(ours.objective_name).build.decoder
        if decoder != "autoregressive":
            raise UnsupportedCall(
                f"objective {ours.objective_name!r} does not generate one token after the other, which transformers' "
                "AutoModelForCausalLM and generate do; generate with omnimix.diffuse"
            )
        self.gradient_checkpointing = False
        self._constructing = True
        self.model = LanguageModel(ours)
        self._tied_weights_keys = self.get_expanded_tied_weights_keys()
        self.post_init()
        self._constructing = False

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Parameters that blocks share: each name -> the first one, which alone is saved."""
        first: dict[int, str] = {}
        named = self.named_parameters(remove_duplicate=False)
        owners = {name: first.setdefault(id(parameter), name) for name, parameter in named}
        return {name: owner for name, owner in owners.items() if name != owner}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: OmnimixCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        cache: OmnimixCache | None = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits, and the loss of the labels.

        Args:
            input_ids: `(b, t)`, int64; or `inputs_embeds`, `(b, t, d)`, in their place.
            attention_mask: `(b, s)`, 0 at padding; the last t columns count. Every row has at least one token.
            position_ids: `(b, t)` or `(1, t)`. Where they restart or descend within a row, another sequence begins
                there, as in batches of transformers' DataCollatorWithFlattening. By default tokens count from the
                start of their row.
            cache: of an earlier call with `use_cache`, from which the tokens resume; it is updated.
            past_key_values: the same, by its name before transformers 5.24.
            labels: `(b, t)`, each token itself; −100 is not scored. The loss is the omnimix objective's, with all that
                its options and experts add.
            logits_to_keep: logits for the last so many columns or for these; 0 for all. With labels 1 saves memory.
            num_items_in_batch: what the summed loss is divided by, in place of the tokens scored here.
            unused: what transformers hands to every model, such as the tokenizer of `generate`; it has no effect.

        Returns:
            loss; logits `(b, t, v)`, all alike at padding; the cache; and hidden_states: the embedded tokens,
            each block's output, and for the last block the normalised one.

        Raises:
            UnsupportedShape: not one of `input_ids` and `inputs_embeds`, a cache under both names, or a row of padding
                only.
            UnsupportedCall: `output_attentions`; or several sequences in a row together with a cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UnsupportedShape("input_ids, inputs_embeds: pass one of them")
        if output_attentions:
            raise UnsupportedCall("output_attentions: mixers have no attention matrices to return; leave it out")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        cache = _either(cache, past_key_values)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        x = self.model.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None and any(unused.get(name) is not None for name in BOUNDARIES):
            raise UnsupportedCall(
                f"{', '.join(BOUNDARIES)}: boundaries of sequences are read off position_ids; pass them"
            )
        rows = Rows.of(x, attention_mask, position_ids)
        if cache is not None and rows.several:
            raise UnsupportedCall("position_ids: they restart within a row, and a cache has one sequence a row")
        taps = [f"blocks.{i}" for i in range(len(self.model.backbone.blocks) - 1)] if output_hidden_states else []
        out = self.model.backbone(
            rows.pack(x),
            Context(Layout(causal=True, cu_seqlens=rows.cu_seqlens), positions=rows.positions),
            None if cache is None else cache.state,
            taps=taps,
        )
        loss = None if labels is None else self._loss(out, labels, rows, num_items_in_batch)
        y = rows.unpack(out.y)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.logits(y[:, keep])
        hidden = (x, *(rows.unpack(out.shared[name]) for name in taps), y) if output_hidden_states else None
        if use_cache and not rows.several:
            cache = OmnimixCache() if cache is None else cache
            cache.update(out.state, x.shape[1])
        kept: dict[str, Any] = {CACHE: cache if use_cache and not rows.several else None}
        output = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=hidden, **kept)
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()

    def _loss(self, out: Output, labels: Tensor, rows: Rows, items: Tensor | int | None) -> Tensor:
        labels = rows.pack(labels.to(out.y.device))
        counted = labels != IGNORED
        objective = self.model.objective
        found = objective.loss(
            _Traced(self.model, out),
            labels.masked_fill(~counted, 0),
            cu_seqlens=rows.cu_seqlens,
            counted=counted,
        )
        return found.loss if items is None else found.loss * found.count / items

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: OmnimixCache | None = None,
        inputs_embeds: Tensor | None = None,
        cache: OmnimixCache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As transformers', which passes new tokens only; without a cache all tokens are new."""
        cache = _either(cache, past_key_values)
        if cache is None and kwargs.get("next_sequence_length") is not None:
            kwargs["next_sequence_length"] = None
        model: Any = super()
        return model.prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **{CACHE: cache}, **kwargs)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *others: Any) -> None:
        """`generate` asks for its cache here, once, with the whole mask at hand."""
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not mask[:, -1].all():
            raise UnsupportedShape(
                "attention_mask: prompts are padded at their ends, and text is generated after the last column; set "
                "tokenizer.padding_side = 'left'"
            )
        if generation_config.cache_implementation is not None:
            raise UnsupportedCall(
                f"cache_implementation is {generation_config.cache_implementation!r}; a model of omnimix keeps its own "
                "states: leave it out"
            )
        if generation_config.use_cache is not False and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = OmnimixCache()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.model.head = new_embeddings

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As transformers'; the vocabulary of the configuration follows."""
        embedding = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.model.config = replace(self.model.config, vocab_size=embedding.num_embeddings)
        self.config.omnimix = to_dict(self.model.config)
        return embedding

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable | None = None, every_n_layers: int = 1
    ) -> None:
        """The backbone has its own: never reentrant, and every block."""
        if every_n_layers != 1:
            raise UnsupportedCall(f"every_n_layers is {every_n_layers}; every block is checkpointed or none")
        self.gradient_checkpointing = enable
        self.model.backbone.set_grad_checkpointing(enable)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """What transformers finds without values: nothing after the constructor, for our model initialises itself."""
        if self._constructing:
            return
        # Buffers that no file holds start as zeros; loading has built them without memory.
        for name in buffers_outside_state_dict(module):
            getattr(module, name).zero_()
        names = {id(m): name for name, m in self.named_modules()}
        parameters = module.named_parameters(recurse=False)
        new = {name: p for name, p in parameters if not loaded(p)}
        if new and id(module) in names:
            lacking = ", ".join(f"{names[id(module)]}.{name}" for name in new)
            raise CheckpointError(f"the checkpoint lacks {lacking}; it is not a whole model")
        # What belongs to no model yet is an embedding or output matrix that is being resized.
        for parameter in new.values():
            nn.init.normal_(parameter, std=0.02)


def to_pretrained(model: LanguageModel | TextGenerator, *, end: int | None = None) -> OmnimixForCausalLM:
    """A copy of a language model as transformers' model.

    Args:
        model: or what `omnimix.load` returns of one, whose tokenizer says the end token.
        end: the tokenizer's end token, with which documents begin and end.

    Raises:
        UnsupportedCall: the objective is one of diffusion, or the model is no language model.
    """
    if isinstance(model, TextGenerator):
        model, end = model.model, model.tokenizer.end if end is None else end
    if not isinstance(model, LanguageModel):
        raise UnsupportedCall(
            f"model is a {type(model).__name__}; transformers' model is made of a LanguageModel, or of what "
            "omnimix.load returns of one"
        )
    config = OmnimixConfig(
        omnimix=to_dict(model.config),
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        architectures=[OmnimixForCausalLM.__name__],
    )
    like = model.embedding.weight
    wrapped = OmnimixForCausalLM(config)
    nn.Module.to(wrapped, like.device, like.dtype)
    wrapped.model.load_state_dict(model.state_dict())
    return wrapped.train(model.training)


def from_run(run: str | Path) -> tuple[OmnimixForCausalLM, PreTrainedTokenizerFast]:
    """Model and tokenizer of a run; `save_pretrained` of both writes a folder of transformers'.

    Args:
        run: its folder, or its name under `runs/`.

    Raises:
        CheckpointError: no such run, or what it holds is no language model.
        UnsupportedCall: a diffusion model.
    """
    model, tokenizer = load_language_model(run)
    return to_pretrained(model, end=tokenizer.end), to_tokenizer(tokenizer)


AutoConfig.register(OmnimixConfig.model_type, OmnimixConfig)
AutoModelForCausalLM.register(OmnimixConfig, OmnimixForCausalLM)
