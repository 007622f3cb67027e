"""Low-rank adapters of the encoder (LoRA, Hu et al. 2022, arXiv 2106.09685) by PEFT, with fusion and head in full.

An adapter folder holds PEFT's files, the tokenizer and the model's `config.json`. `hf upload org/adapter RUN/adapter`
publishes all of it, the `push_to_hub` of the model, its config and the tokenizer each a part. PEFT loads and merges it:

    base = XLFAForQuestionAnswering.from_encoder("xlm-roberta-base", **fields)
    model = PeftModel.from_pretrained(base, "org/adapter")
    model.merge_and_unload().save_pretrained("merged")

`load_adapter` builds the base with the fields of that `config.json`. The table of `ot_marginals="idf"`, which only the
alignment term reads, is in the merged model but not in the adapter: training fills it from the parallel text.
"""

import logging
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from modeling_xlfa import XLFAConfig
from modeling_xlfa.encoder_xlfa import load_encoder
from modeling_xlfa.modeling_xlfa import XLFAPreTrainedModel
from xlfa.arguments import ModelArguments
from xlfa.backbones import PREFIX, resolve_encoder
from xlfa.errors import XLFAError

logger = logging.getLogger(__name__)

# In a run folder, beside the merged model.
ADAPTER_FOLDER = "adapter"
RANK, ALPHA, DROPOUT = 8, 16, 0.1
# The modules that start from random weights, as far as a model has them: they are trained and saved in full.
FULLY_TRAINED = ("xlfa.fusion", "qa_outputs", "classifier")


def add_adapters(model: XLFAPreTrainedModel, arguments: ModelArguments) -> PeftModel:
    """Freeze the encoder of a head and add what `--peft lora` trains; logs the number of trained parameters.

    Raises:
        XLFAError: for an encoder that PEFT's table does not have, or target modules that the encoder does not have.
    """
    encoder_type = model.config.text_config.model_type
    targets = arguments.lora_target_modules or TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(encoder_type)
    if targets is None:
        raise XLFAError(
            f"--peft lora: PEFT names no target modules for a {encoder_type!r} encoder: name linear layers of it with "
            f"--lora_target_modules, of {', '.join(linear_layers(model.base_model.encoder))}"
        )
    _name_encoder(model, public_name(arguments))
    # Else set only when a whole model is saved.
    model.config.architectures = [type(model).__name__]
    parameters = model.num_parameters()
    modules = dict(model.named_modules())
    settings = LoraConfig(
        r=arguments.lora_r or RANK,
        lora_alpha=arguments.lora_alpha or ALPHA,
        lora_dropout=DROPOUT if arguments.lora_dropout is None else arguments.lora_dropout,
        target_modules=targets,
        modules_to_save=[name for name in FULLY_TRAINED if name in modules],
    )
    try:
        adapted = get_peft_model(model, settings)
    except ValueError as error:
        raise XLFAError(
            f"--lora_target_modules {' '.join(targets)}: {error} The linear layers of the encoder are "
            f"{', '.join(linear_layers(model.base_model.encoder))}"
        ) from None
    trained = adapted.get_nb_trainable_parameters()[0]
    logger.info("LoRA: %d of %d parameters are trained (%.2f %%)", trained, parameters, 100 * trained / parameters)
    return adapted


def linear_layers(encoder: nn.Module) -> list[str]:
    """The last names of its linear layers, each once."""
    names = (name.rpartition(".")[2] for name, module in encoder.named_modules() if isinstance(module, nn.Linear))
    return list(dict.fromkeys(names))


def public_name(arguments: ModelArguments) -> str | None:
    """The name under which others find the encoder; None for a local folder and for a trimmed vocabulary."""
    return None if arguments.trim_vocab or Path(arguments.model).is_dir() else arguments.model


def _name_encoder(model: XLFAPreTrainedModel, name: str | None) -> None:
    """Set what PEFT writes as the base model, the first into an adapter's settings, the second into its card.

    A card with a name that cannot be one on the Hub, such as an empty one, would be refused there: it has none.
    """
    model.name_or_path = name or ""
    model.config._name_or_path = None if name is None or name.startswith(PREFIX) else name


def plain_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The head itself, whether or not there are adapters in it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_adapter(name_or_path: str) -> bool:
    """Whether a folder or Hub id holds adapters and not a whole model."""
    return find_adapter_config_file(name_or_path) is not None


def load_adapter(model_class: type[XLFAPreTrainedModel], name_or_path: str, encoder: str | None = None) -> PeftModel:
    """A head with the adapters of a folder or Hub id, in evaluation mode.

    Args:
        model_class: the head that was trained.
        name_or_path: what `--peft lora` wrote to `adapter/`, or where that was pushed to.
        encoder: by default the one that the adapter names; needed where that was a local folder.

    Raises:
        XLFAError: for an adapter whose weights are a pickle, one that names no encoder where none is given, or one that
            has other sizes.
        OSError: where there is no such adapter or encoder.
    """
    # PEFT would take adapter_model.bin instead.
    if cached_file(name_or_path, ADAPTER_SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False) is None:
        raise XLFAError(
            f"{name_or_path} holds adapters without {ADAPTER_SAFE_WEIGHTS_NAME}; a pickle is not read: save them with "
            "PEFT's save_pretrained"
        )
    config = XLFAConfig.from_pretrained(name_or_path)
    encoder = encoder or PeftConfig.from_pretrained(name_or_path).base_model_name_or_path
    if not encoder:
        raise XLFAError(
            f"{name_or_path} holds adapters of an encoder that was a local folder: take the merged model of the run"
        )
    base = model_class(config)
    try:
        base.base_model.encoder.load_state_dict(load_encoder(resolve_encoder(encoder), config.text_config).state_dict())
    except RuntimeError as error:
        raise XLFAError(f"{name_or_path} holds adapters of another encoder than {encoder}: {error}") from None
    _name_encoder(base, None if Path(encoder).is_dir() else encoder)
    return PeftModel.from_pretrained(base, name_or_path)


def check_same_adapters(checkpoint: str, model: PeftModel) -> None:
    """Raise `XLFAError` if the checkpoint's adapters have other settings than the model's.

    PEFT would load another alpha or dropout unnoticed.
    """
    ours, theirs = model.peft_config[model.active_adapter], PeftConfig.from_pretrained(checkpoint)
    for name in ("r", "lora_alpha", "lora_dropout", "target_modules"):
        if getattr(ours, name) != getattr(theirs, name):
            raise XLFAError(
                f"--resume_from_checkpoint {checkpoint}: it was trained with {name}={getattr(theirs, name)!r}, not "
                f"{getattr(ours, name)!r}: give the settings of that run, or start a new one in another --output_dir"
            )
