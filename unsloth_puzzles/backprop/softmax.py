"""What losses are made of: statistics of a row of logits, in float32 or wider, in as few passes as there can be."""

import math

import torch

_LOG2_E = math.log2(math.e)


def _softmax_parts(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """exp(z - m) of each logit, its sum over the row and log(sum(exp(z))): (..., vocabulary), (...), (...).

    m is the row's maximum. It only keeps the exponentials finite and cancels out, so autograd takes it for a constant.
    A logit of -inf masks its class. e^x as 2^(x log2(e)) is one multiplication and the GPU's own instruction, where
    Inductor's exp spends three more to keep subnormal results, which no sum notices.
    """
    highest = z.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(z.dtype).min)
    exponentials = torch.exp2((z - highest) * _LOG2_E)
    total = exponentials.sum(-1)
    return exponentials, total, total.log() + highest.squeeze(-1)


def log_sum_exp(z: torch.Tensor) -> torch.Tensor:
    """log(sum(exp(z))) of each row.

    Args:
        z: [..., vocab], float32 or float64. A logit of -inf masks its class.

    Returns:
        [...] in the dtype of `z`.
    """
    return _softmax_parts(z)[-1]


def softmax_statistics(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log(sum(exp(z))) and the expected z under softmax(z), of each row. Entropy is their difference.

    Args:
        z: [..., vocab], float32 or float64. A logit of -inf masks its class.

    Returns:
        Two tensors [...] in the dtype of `z`.
    """
    exponentials, total, lse = _softmax_parts(z)
    return lse, (exponentials * torch.where(exponentials > 0, z, 0)).sum(-1) / total


def upcast(logits: torch.Tensor) -> torch.Tensor:
    """`logits` of any floating dtype and shape in float32; float64 stays as it is."""
    return logits if logits.dtype == torch.float64 else logits.float()


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless `temperature` is above 0."""
    if temperature <= 0:
        raise ValueError(f"temperature must be a number above 0, got {temperature}")


def cooled(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """logits / temperature.

    Args:
        logits: A floating dtype, any shape.
        temperature: Above 0.

    Returns:
        A tensor of the same shape, float32 or wider.

    Raises:
        ValueError: `temperature` is not above 0.
    """
    check_temperature(temperature)
    return upcast(logits) / temperature


def log_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """log softmax(logits / temperature) of each row.

    Args:
        logits: [..., vocab], a floating dtype.
        temperature: Above 0.

    Returns:
        [..., vocab], float32 or wider.

    Raises:
        ValueError: `temperature` is not above 0.
    """
    z = cooled(logits, temperature)
    return z - log_sum_exp(z)[..., None]


def mean_under(probabilities: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Expected value of each row.

    A class of probability 0 counts nothing, also where its value is infinite: a logit of -inf masks a class.

    Args:
        probabilities: [..., vocab], a floating dtype; each row adds up to 1.
        values: [..., vocab], a floating dtype.

    Returns:
        [...] in the dtype to which the two are promoted.
    """
    return (probabilities * torch.where(probabilities > 0, values, 0)).sum(-1)


def target_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """logits[..., label] of each row.

    A comparison, not `gather`: Inductor fuses it into the softmax's own passes, whereas the gradient of `gather` is a
    scatter into a float32 temporary as large as the logits.

    Args:
        logits: [..., vocab], a floating dtype.
        labels: [...] integers.

    Returns:
        [...] in the dtype of `logits`, 0 where the label is no index.
    """
    classes = torch.arange(logits.shape[-1], dtype=torch.int32, device=logits.device)
    return torch.where(classes == labels[..., None].int(), logits, 0).sum(-1)


def is_counted(labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Which labels are not `ignore_index`.

    In int64: PyTorch would convert -100 to the labels' dtype, where it is 156 in uint8.

    Args:
        labels: [...] integers.
        ignore_index: The label of rows that do not count.

    Returns:
        [...] bool.
    """
    return labels.long() != ignore_index
