"""Gradients of the answers' cross-entropy at every linear of the decoder, through the unquantized model.

L = -sum over answer tokens log p(token | what stands before it), g_t = mean over channels |dL / dZ_t|. A sum, so that
neither the batch nor the length of an answer changes how a token counts. One forward and one backward pass of the
whole model per batch: its activations must fit the device.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vlmq_serve.calibrate.capture import batch_inputs, output_taps, require_grad
from vlmq_serve.calibrate.samples import ANSWER, CalibrationSample


def answer_loss(logits: Tensor, ids: Tensor, modality: Tensor) -> Tensor:
    """Summed cross-entropy of answer tokens: logits [B, T, V], ids and modality [B, T]; position t predicts t+1."""
    answers = modality[:, 1:].to(ids.device) == ANSWER
    return nn.functional.cross_entropy(logits[:, :-1][answers].float(), ids[:, 1:][answers], reduction="sum")


def answer_gradients(
    model: nn.Module, layers: nn.ModuleList, linears: Sequence[str], inputs: Mapping[str, Tensor], modality: Tensor
) -> list[dict[str, Tensor]]:
    """Per layer g_t, fp32 [B, T] on the CPU, at each of its `linears` for one batch of equally long samples."""
    names = [f"{index}.{name}" for index in range(len(layers)) for name in linears]
    with torch.enable_grad(), output_taps(layers, names, require_grad) as outputs:
        loss = answer_loss(model(**inputs, use_cache=False).logits, inputs["input_ids"], modality)
        found = torch.autograd.grad(loss, [outputs[name] for name in names])
    sizes = [gradient.float().abs().mean(-1).cpu() for gradient in found]
    width = len(linears)
    return [dict(zip(linears, sizes[i * width : (i + 1) * width], strict=True)) for i in range(len(layers))]


class AnswerGradients:
    """Collects the gradients of a model batch by batch; `layers[i][linear]` holds one tensor [B, T] per batch."""

    def __init__(self, model: nn.Module, layers: nn.ModuleList, linears: Sequence[str], device: torch.device) -> None:
        self._model, self._modules, self._linears, self._device = model, layers, tuple(linears), device
        self.layers: list[dict[str, list[Tensor]]] = [{name: [] for name in linears} for _ in layers]

    def add(self, samples: list[CalibrationSample]) -> None:
        """Measure equally long samples; the model visits the device for them."""
        self._model.to(self._device)
        inputs, modality = batch_inputs(samples, self._device), torch.stack([s.modality for s in samples])
        found = answer_gradients(self._model, self._modules, self._linears, inputs, modality)
        for kept, new in zip(self.layers, found, strict=True):
            for name, gradient in new.items():
                kept[name].append(gradient)
