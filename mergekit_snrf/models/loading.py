"""Models, processors and tokenizers, loaded by transformers as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

from mergekit_snrf.errors import SnrfError, first_line
from mergekit_snrf.files.reading import load_json
from mergekit_snrf.models.checkpoint import open_checkpoint
from mergekit_snrf.models.reference import ModelRef

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def load_model(ref: ModelRef, *, images: bool | None) -> tuple[PreTrainedModel, Any]:
    """Load a model in eval mode, with its processor (images) or its tokenizer (text only).

    ``images`` says whether its inputs have some; None: if it has an image processor. ``SnrfError``: the device does not
    exist, the checkpoint cannot be loaded, lacks weights or has some that are not finite, or its code is not trusted.
    """
    place = None if ref.device_map is not None else find_device(ref.device)
    options: dict[str, Any] = {"dtype": "auto" if ref.dtype == "auto" else getattr(torch, ref.dtype)}
    if ref.device_map is not None:
        options["device_map"] = ref.device_map
    processor = load_processor(ref, images=images)
    with _explained(ref, "model"):
        auto = _model_class(ref, load_config(ref))
        model, report = auto.from_pretrained(ref.model, output_loading_info=True, **options, **ref.origin)
        missing = sorted(map(str, report.get("missing_keys") or ()))
        if missing:
            what = f"{len(missing)} weights are missing and would be random, such as {missing[0]}"
            raise SnrfError(ref.model, what, "use a complete checkpoint")
        if place is not None:
            model = model.to(place)
    _check_finite(ref, model)
    return model.eval(), processor


def load_processor(ref: ModelRef, *, images: bool | None) -> Any:
    """Load a model's processor (images) or its tokenizer (text only); a tokenizer without padding gets it."""
    from transformers import AutoProcessor, AutoTokenizer

    if images is None:
        files = () if ref.gguf_file is not None else open_checkpoint(ref.model, ref.revision).files
        images = any(name in files for name in ("processor_config.json", "preprocessor_config.json"))
    if images:
        with _explained(ref, "processor"):
            processor = AutoProcessor.from_pretrained(ref.model, **ref.origin)
        if tokenizer_of(processor) is processor:
            remedy = "leave out the images, or use a vision-language model with its processor files"
            raise SnrfError(ref.model, "has no image processor", remedy, field="images")
    else:
        with _explained(ref, "tokenizer"):
            processor = AutoTokenizer.from_pretrained(ref.model, **ref.origin)
            if not processor.chat_template:
                # Older vision-language checkpoints keep their chat template where only the processor looks.
                processor.chat_template = _processor_chat_template(ref)
    tokenizer = tokenizer_of(processor)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return processor


def tokenizer_of(processor: Any) -> Any:
    """Return the tokenizer of a processor, or the tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


def find_device(device: str | None) -> torch.device:
    """Return the torch device of that name, or raise ``SnrfError``; for None cuda if there is one, else cpu."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None:
        return torch.device("cuda" if count else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise SnrfError(None, f"{device!r} is not a torch device", "use cpu, cuda or cuda:N", field="device") from None
    if found.type == "cuda" and (found.index or 0) >= count:
        what = f"{device!r} is not available, torch {torch.__version__} finds {count} CUDA devices"
        raise SnrfError(None, what, "use cpu or another device, or check torch's build and the driver", field="device")
    if found.type not in ("cpu", "cuda", "meta") and not getattr(torch, found.type, None):
        what = f"{device!r} is not available in torch {torch.__version__}"
        raise SnrfError(None, what, "use cpu or cuda", field="device")
    return found


def load_config(ref: ModelRef) -> PretrainedConfig:
    """Return the model's configuration as transformers reads it, also of a GGUF file."""
    from transformers import AutoConfig

    with _explained(ref, "configuration"):
        return AutoConfig.from_pretrained(ref.model, **ref.origin)


def _model_class(ref: ModelRef, config: PretrainedConfig) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    remote = getattr(config, "auto_map", None) or {}
    for auto, mapping in (
        (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
        (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    ):
        if type(config) in mapping or auto.__name__ in remote:
            return auto
    if "AutoModel" in remote:
        return AutoModel
    what = f"transformers has no text-generating model for model_type {getattr(config, 'model_type', '')!r}"
    raise SnrfError(ref.model, what, "use a decoder-only text model or a vision-language model")


def _processor_chat_template(ref: ModelRef) -> str | None:
    from transformers.utils import cached_file

    silent = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    file = cached_file(ref.model, "chat_template.json", revision=ref.revision, **silent)
    return None if file is None else load_json(file).get("chat_template")


def _check_finite(ref: ModelRef, model: PreTrainedModel) -> None:
    for name, weight in model.named_parameters():
        if not weight.is_floating_point() or weight.itemsize < 2 or weight.is_meta:
            continue
        # Both ends are NaN if one weight is, and nothing is copied.
        if weight.numel() and not all(end.isfinite() for end in weight.detach().aminmax()):
            what = f"weight {name} has NaN or infinite values in {str(weight.dtype).removeprefix('torch.')}"
            raise SnrfError(ref.model, what, "use another dtype, or get the checkpoint again")


@contextmanager
def _explained(ref: ModelRef, what: str) -> Iterator[None]:
    """Turn what transformers raises while it loads ``what`` into an ``SnrfError``."""
    try:
        yield
    except SnrfError:
        raise
    except torch.OutOfMemoryError as error:
        problem = f"the {what} does not fit in the memory of the device ({first_line(error)})"
        remedy = "use a smaller dtype, several devices, or the CPU"
        raise SnrfError(ref.model, problem, remedy, field="device") from None
    except Exception as error:
        if "trust_remote_code" in str(error) and not ref.trust_remote_code:
            problem = f"is off, but the {what} needs code that the checkpoint brings along"
            raise SnrfError(ref.model, problem, "read that code, then turn it on", field="trust_remote_code") from None
        if "torchvision" in str(error).lower() or isinstance(error, ImportError):
            raise _missing_package(ref, what, error) from None
        problem = f"the {what} cannot be loaded ({first_line(error)})"
        raise SnrfError(ref.model, problem, "check the path or hub id") from None


def _missing_package(ref: ModelRef, what: str, error: Exception) -> SnrfError:
    state = None
    try:
        installed = version("torchvision")
        import_module("torchvision")
    except PackageNotFoundError:
        state = "is not installed" if "torchvision" in str(error).lower() else None
    except Exception as broken:
        state = f"is installed as {installed} and cannot be imported ({first_line(broken)})"
    if state is None:
        return SnrfError(ref.model, f"the {what} needs a package that is missing ({first_line(error)})", "install it")
    # torchvision 0.(n + 15) belongs to torch 2.n.
    major, minor = torch.__version__.split(".")[:2]
    fitting = f"'torchvision=={int(major) - 2}.{int(minor) + 15}.*'"
    remedy = f"pip install {fitting}, which belongs to torch {torch.__version__}"
    return SnrfError(ref.model, f"the {what} needs torchvision, which {state}", remedy)
