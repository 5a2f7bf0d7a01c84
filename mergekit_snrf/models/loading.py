"""Models, processors and tokenizers as stock transformers loads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.profiling.probes.render import tokenizer_of
from mergekit_snrf.profiling.settings import SideConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def load_model(
    side: SideConfig,
    *,
    device: str | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Load a side's model in eval mode, with its processor (image probes) or tokenizer (text probes).

    The class is AutoModelForImageTextToText for a vision-language model and AutoModelForCausalLM for a text model;
    attention is what transformers chooses by itself.

    Args:
        side: model, revision and gguf_file; the images of its probes decide on processor or tokenizer.
        device: such as ``cuda:0``; None: cuda if there is one, else cpu.
        dtype: of the weights; ``auto`` is that of the checkpoint.
        device_map: ``auto`` spreads the layers over all devices; excludes ``device``.
        trust_remote_code: run code that lies in the checkpoint.

    Raises:
        SnrfError: the device does not exist, the checkpoint cannot be loaded or lacks weights, or it needs
            code of its own that was not trusted.
    """
    place = None if device_map is not None else find_device(device)
    options: dict[str, Any] = {"dtype": _find_dtype(dtype)}
    if device_map is not None:
        options["device_map"] = device_map
    processor = load_processor(side, trust_remote_code=trust_remote_code)
    config = _load_config(side, trust_remote_code)
    auto = _model_class(side, config)
    with _explained(side, "model", trust_remote_code):
        model, report = auto.from_pretrained(
            side.model, output_loading_info=True, **options, **_origin(side, trust_remote_code)
        )
    missing = sorted(map(str, report.get("missing_keys") or ()))
    if missing:
        raise SnrfError(
            f"{side.model}: {len(missing)} weights are missing, such as {missing[0]}, and would be random; give a "
            f"complete checkpoint"
        )
    if place is not None:
        with _explained(side, "model", trust_remote_code):
            model = model.to(place)
    return model.eval(), processor


def load_processor(side: SideConfig, *, trust_remote_code: bool = False) -> Any:
    """Load a side's processor if its probes have images, else its tokenizer; a tokenizer without padding gets one.

    Raises:
        SnrfError: it cannot be loaded, or image probes meet a model without an image processor.
    """
    from transformers import AutoProcessor, AutoTokenizer

    origin = _origin(side, trust_remote_code)
    if side.probes.images is None:
        with _explained(side, "tokenizer", trust_remote_code):
            processor = AutoTokenizer.from_pretrained(side.model, **origin)
            if not processor.chat_template and side.template is None:
                # Older vision-language checkpoints keep their chat template where only the processor looks.
                processor.chat_template = _processor_chat_template(side, origin)
    else:
        with _explained(side, "processor", trust_remote_code):
            processor = AutoProcessor.from_pretrained(side.model, **origin)
        if tokenizer_of(processor) is processor:
            raise SnrfError(
                f"{side.model}: has no image processor, but its probes have images; remove probes.images or give a "
                f"vision-language model with its processor files"
            )
    tokenizer = tokenizer_of(processor)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return processor


def find_device(device: str | None) -> torch.device:
    """Return the device of that name, or cuda if there is one and else cpu for None.

    Raises:
        SnrfError: torch knows no such device, or sees none.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise SnrfError(f"device {device!r} is not a device of torch; use cpu, cuda or cuda:N") from None
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise SnrfError(
                f"device {device!r} was asked for, but torch {torch.__version__} sees no CUDA device; use device: cpu, "
                f"or install a CUDA build of torch and a driver"
            )
        if found.index is not None and found.index >= count:
            raise SnrfError(f"device {device!r} does not exist, there are {count} CUDA devices, counted from cuda:0")
    elif found.type not in ("cpu", "meta") and not getattr(torch, found.type, None):
        raise SnrfError(f"device {device!r} is not available in torch {torch.__version__}; use cpu or cuda")
    return found


def _find_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in _DTYPES:
        raise SnrfError(f"dtype {dtype!r} is not supported; use one of {', '.join(_DTYPES)}")
    return getattr(torch, dtype)


def _origin(side: SideConfig, trust_remote_code: bool) -> dict[str, Any]:
    origin: dict[str, Any] = {"revision": side.revision, "trust_remote_code": trust_remote_code}
    if side.gguf_file is not None:
        origin["gguf_file"] = side.gguf_file
    return {key: value for key, value in origin.items() if value is not None}


def _load_config(side: SideConfig, trust_remote_code: bool) -> PretrainedConfig:
    from transformers import AutoConfig

    with _explained(side, "configuration", trust_remote_code):
        return AutoConfig.from_pretrained(side.model, **_origin(side, trust_remote_code))


def _model_class(side: SideConfig, config: PretrainedConfig) -> Any:
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
    raise SnrfError(
        f"{side.model}: transformers has no text-generating model for model_type "
        f"{getattr(config, 'model_type', '')!r}; give a decoder-only text model or a vision-language model"
    )


def _processor_chat_template(side: SideConfig, origin: dict[str, Any]) -> str | None:
    from transformers.utils import cached_file

    file = cached_file(
        side.model,
        "chat_template.json",
        revision=origin.get("revision"),
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:
        return None
    return json.loads(Path(file).read_text(encoding="utf-8")).get("chat_template")


@contextmanager
def _explained(side: SideConfig, what: str, trust_remote_code: bool) -> Iterator[None]:
    """Turn what transformers raises while it loads into one sentence."""
    try:
        yield
    except SnrfError:
        raise
    except torch.OutOfMemoryError as error:
        raise SnrfError(
            f"{side.model}: its {what} does not fit in the memory of the device ({_first_line(error)}); use "
            f"device_map: auto, a smaller dtype, or device: cpu"
        ) from None
    except Exception as error:
        text = str(error)
        if "trust_remote_code" in text and not trust_remote_code:
            raise SnrfError(
                f"{side.model}: runs code of its own; read that code, then set trust_remote_code: true to allow it"
            ) from None
        if "torchvision" in text.lower():
            raise SnrfError(
                f"{side.model}: its {what} needs torchvision; pip install torchvision, in the version that goes with "
                f"torch {torch.__version__}"
            ) from None
        if isinstance(error, ImportError):
            raise SnrfError(
                f"{side.model}: its {what} needs a package that is missing ({_first_line(error)})"
            ) from None
        remedy = "check the path or hub id"
        raise SnrfError(f"{side.model}: its {what} cannot be loaded ({_first_line(error)}); {remedy}") from None


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
