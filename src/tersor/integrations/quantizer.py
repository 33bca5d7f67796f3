"""tersor as a quantizer of transformers: linear layers of any model, quantized while they are loaded, run on tersor's kernels.

    AutoModelForCausalLM.from_pretrained(folder, quantization_config=TersorConfig("clip:int4_g64s"))

transformers builds the model without values; then, here,
    before the weights come   every torch.nn.Linear becomes a TersorLinear, and the recipe says what each matrix is to be
    as each weight comes      it is rounded, and the float is dropped
    when all have come        layers that share an input are joined, norms and plain decoder layers moved to the native kernels

The recipe's grammar and defaults are tersor's (tersor/recipe.py), with methods that need no calibration data. Names are the model's
own. Not touched: what is no torch.nn.Linear (GPT-2's Conv1D, experts in one tensor), embeddings that are not the model's input.
The model computes in float32, whatever dtype was asked for: norms and attention are faster so on a CPU, and nothing is rounded twice.

Source of the interface: huggingface/transformers src/transformers/quantizers/{base,auto}.py.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tersor.errors import ContainerError, ModelError, RecipeError, TersorError, unknown
from tersor.formats import get_format
from tersor.integrations.decoder_layer import replace_layers
from tersor.integrations.linear import Joined, TersorLinear
from tersor.integrations.matrix import ACTIVATIONS, Matrix
from tersor.integrations.norm import replace_norms
from tersor.integrations.saving import stored_state
from tersor.integrations.weight import QuantizedWeight
from tersor.models.spec import GROUPS
from tersor.recipe import KEEP, Choice, Recipe
from tersor.slabs import check_finite
from tersor.tensor import QuantizedTensor, TensorInfo

METHOD = "tersor"
_FORMATS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_SHARING = tuple(tuple(name.rpartition(".")[2] for name in group) for group in GROUPS if len(group) > 1)  # names of sibling layers


@register_quantization_config(METHOD)
class TersorConfig(QuantizationConfigMixin):
    """What to do with the weights: a recipe (tersor/recipe.py) of methods that need no data; and how products round their input.

    activations: int8, int8_token, llm_int8 or float, as tersor.ops.pack says.
    """

    def __init__(self, recipe: str = "rtn:int4_g64s", activations: str = "int8", quant_method: str = METHOD) -> None:
        """Raises RecipeError or FormatError for what is unknown or needs calibration data."""
        if quant_method != METHOD:
            raise RecipeError(f"TersorConfig: quant_method {quant_method!r}, need {METHOD!r}")
        if activations not in ACTIVATIONS:
            raise RecipeError(unknown("activations", activations, ACTIVATIONS))
        parsed = Recipe.parse(recipe)
        for step in parsed.steps:
            if step.method.needs != "nothing" or step.method.stage != "round":
                raise RecipeError(
                    f"TersorConfig: {step} needs more than one weight at a time; use rtn, clip or hqq, or run `tersor quantize` and"
                    " load its output"
                )
        self.quant_method: Any = METHOD
        self.recipe = str(parsed)
        self.activations = activations
        self._saved: dict[str, Any] | None = None  # quantization_config of the directory last written

    def to_dict(self) -> dict[str, Any]:
        """Returns what a saved config.json says: of a saved model, the container's own quantization_config."""
        return dict(self._saved) if self._saved else {"quant_method": METHOD, "recipe": self.recipe, "activations": self.activations}


class _Quantize(ConversionOps):
    """Turns one weight into a QuantizedWeight, as it is loaded."""

    def __init__(self, quantizer: TersorQuantizer) -> None:
        self._quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Returns {name: parameter}."""
        (value,) = input_dict.values()
        name = kwargs["full_layer_name"]
        return {name: self._quantizer.parameter(name, value[0] if isinstance(value, list) else value)}


@register_quantizer(METHOD)
class TersorQuantizer(HfQuantizer):
    """The quantizer; see the file's docstring. One object serves one model."""

    requires_calibration = False
    quantization_config: TersorConfig

    def __init__(self, quantization_config: TersorConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if self.pre_quantized:
            raise ContainerError(
                f"config.json names the quant_method {METHOD}, but tersor has no file format of its own and writes none;"
                " remove quantization_config when the weights are floats"
            )
        self._choices: dict[str, Choice] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._dtype = torch.float32  # of the checkpoint
        self.failure: TersorError | None = None

    def validate_environment(self, *args: object, device_map: Any = None, **kwargs: object) -> None:
        """Raises ModelError for a device that is not the CPU."""
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        for device in devices:
            if device is not None and str(device) not in ("cpu", "auto"):
                raise ModelError(f"device_map: {device}; tersor's kernels run on the CPU, use device_map='cpu' or none")

    def update_device_map(self, device_map: Any) -> dict[str, Any] | None:
        """Returns the CPU for everything, if a map was asked for."""
        return None if device_map is None else {"": torch.device("cpu")}

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Returns float32."""
        self._dtype = dtype
        return torch.float32

    def _process_model_before_weight_loading(self, model: Any, **kwargs: object) -> None:
        edges = _replace_linears(model)
        stored = _FORMATS.get(self._dtype, "f32")
        aliases, infos = {}, {}
        for name, module, edge in edges:
            weight = f"{name}.weight"
            alias = f"{name}.{edge}.weight" if edge and edge not in name.split(".") else weight
            shape = tuple(module.weight.shape)
            infos[alias] = TensorInfo(alias, stored, shape, get_format(stored).nbytes(shape))
            aliases[alias] = weight
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        untied = {alias: info for alias, info in infos.items() if aliases[alias] not in tied}
        recipe = Recipe.parse(self.quantization_config.recipe)
        choices = recipe.assign(untied, gguf=False, tied=len(untied) < len(infos))
        self._choices = {aliases[alias]: choice for alias, choice in choices.items()}
        self._infos = {aliases[alias]: info for alias, info in untied.items()}
        for weight, info in self._infos.items():
            self._choices[weight].format_for(TensorInfo(weight, info.format, info.shape, info.nbytes))  # what cannot be is refused now

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: object) -> bool:
        """Returns whether the recipe has something to say of this parameter."""
        return param_name in self._choices

    def get_quantize_ops(self) -> _Quantize:
        """Returns what turns a weight into a QuantizedWeight."""
        return _Quantize(self)

    def parameter(self, name: str, value: torch.Tensor) -> torch.nn.Parameter:
        """Returns the weight as the recipe wants it.

        transformers would log an error here and go on, so the first is kept, the rest left as they are, and it is raised at the end.
        """
        if self.failure is None:
            try:
                weight = value if isinstance(value, QuantizedWeight) else QuantizedWeight(self._rounded(name, value))
                return torch.nn.Parameter(weight, requires_grad=False)
            except TersorError as error:
                self.failure = error
        return torch.nn.Parameter(value, requires_grad=False)

    def _rounded(self, name: str, value: torch.Tensor) -> Matrix:
        w = value.detach().float().contiguous().numpy()
        check_finite(w, name)
        choice, info = self._choices[name], self._infos[name]
        chosen = choice.format_for(info)
        fmt = get_format(info.format if chosen == KEEP else chosen)
        cast = choice.is_cast or chosen == KEEP
        tensor: QuantizedTensor = fmt.quantize(w) if cast else choice.step.method.run(w, fmt, None, choice.step.options)
        if tensor.fields.get("values") is w:  # the loader's own memory
            tensor = QuantizedTensor(tensor.format, tensor.shape, {"values": w.copy()})
        return Matrix.of(tensor, self.quantization_config.activations)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: object) -> Any:
        """Raises the first TersorError of rounding."""
        if self.failure is not None:
            raise self.failure
        _make_others_float(model)
        finish(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """Returns what save_pretrained writes: the tensors of a compressed-tensors directory. Raises ContainerError when a format
        has no place there. With transformers' own adapters loaded, None: only those are written."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        state, self.quantization_config._saved = stored_state(model)
        return state, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Returns the model with torch's own linear layers, of the dequantized weights."""
        for module in list(model.modules()):
            for key, child in list(module.named_children()):
                if isinstance(child, TersorLinear):
                    module._modules[key] = _float_linear(child, dtype or torch.float32)
            weight = module._parameters.get("weight")
            if isinstance(weight, QuantizedWeight):
                module.weight = torch.nn.Parameter(weight.dense().to(dtype or torch.float32), requires_grad=False)
        model.tie_weights()
        return model

    def is_serializable(self) -> bool:
        """Returns True; get_state_dict_and_metadata refuses what cannot be written."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters are; the weights are not."""
        return True


def finish(model: Any) -> None:
    """Joins layers that share an input, packs every matrix, and moves RMS norms and plain layers to the native kernels."""
    joins = not getattr(model.config, "is_encoder_decoder", False)
    for module in model.modules():
        for names in _SHARING if joins else ():
            _join([module._modules.get(name) for name in names])
    for module in model.modules():
        if isinstance(module, TersorLinear) and module.joined is None and isinstance(module.weight, QuantizedWeight):
            module.weight.matrix.packed  # noqa: B018 (made now, so that the first token does not wait)
    replace_norms(model)
    replace_layers(model)


def _make_others_float(model: Any) -> None:
    """Makes quantized weights ordinary ones in modules that do more with them than a product or a look-up."""
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if isinstance(weight, QuantizedWeight) and not isinstance(module, TersorLinear | torch.nn.Embedding):
                module._parameters[name] = torch.nn.Parameter(weight.dense(), requires_grad=False)


def _join(layers: list[Any]) -> None:
    if not all(type(layer) is TersorLinear and isinstance(layer.weight, QuantizedWeight) for layer in layers):
        return
    matrices = [layer.weight.matrix for layer in layers]
    if len({m.shape[1] for m in matrices}) == 1:
        joined = Joined(matrices)
        for index, layer in enumerate(layers):
            layer.joined = (joined, index)


def _replace_linears(model: Any) -> list[tuple[str, Any, str]]:
    """Replaces every torch.nn.Linear; returns (name, module, what it is) of these and of the input embedding, which is
    `embed_tokens`, as the head is `lm_head`, and everything else ""."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    found: list[tuple[str, Any, str]] = []
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear:
            layer = TersorLinear(module.in_features, module.out_features, module.bias is not None, torch.float32)
            layer.train(module.training)
            parent, _, key = name.rpartition(".")
            model.get_submodule(parent)._modules[key] = layer
            found.append((name, layer, "lm_head" if module is head else ""))
        elif module is embedding and isinstance(module, torch.nn.Embedding):
            found.append((name, module, "embed_tokens"))
    return found


def _float_linear(layer: TersorLinear, dtype: torch.dtype) -> torch.nn.Linear:
    made = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    weight = layer.weight.dense() if isinstance(layer.weight, QuantizedWeight) else layer.weight.detach()
    made.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
    if layer.bias is not None:
        made.bias = torch.nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    return made.train(layer.training)
