"""An ensemble is the trainer's prior, several at once: same predictions, same updates."""

import pytest
import torch
from eclipse.lab.ensemble import LENGTHS, Ensemble, Pairs, Settings, Training, forward, orders
from eclipse.trainer.loss import Draw, Objective
from eclipse.trainer.model.prior import PackedText, Prior, PriorConfig
from eclipse.trainer.optim import orthogonalised

CONFIG = PriorConfig(16, num_layers=2, num_attention_heads=2, attention_head_dim=8)
COUNTS = (6, 4, 2, 2)


def pairs() -> Pairs:
    generator = torch.Generator().manual_seed(0)
    text, states, lengths, picture = [], [], [], []
    for c, (count, longest) in enumerate(zip(COUNTS, LENGTHS, strict=True)):
        shortest = LENGTHS[c - 1] if c else 2
        length = torch.randint(shortest + 1, longest + 1, (count,), generator=generator)
        real = torch.arange(longest) < length[:, None]
        text.append(torch.randn(count, 16, generator=generator).half())
        states.append((torch.randn(count, longest, 16, generator=generator) * real[..., None]).half())
        lengths.append(length)
        picture.append(torch.arange(count) + sum(COUNTS[:c]))
    image = torch.randn(sum(COUNTS), 16, generator=generator).half()
    return Pairs(image, text, states, lengths, picture, torch.tensor(COUNTS))


def packed(data: Pairs) -> tuple[torch.Tensor, PackedText]:
    some = [
        s[i, :n] for s, lengths in zip(data.states, data.lengths, strict=True) for i, n in enumerate(lengths.tolist())
    ]
    offsets = torch.tensor([0, *(len(s) for s in some)]).cumsum(0)
    return torch.cat(data.text).float(), PackedText(torch.cat(some).float(), offsets)


def test_every_member_predicts_what_its_prior_does() -> None:
    ensemble, data = Ensemble(CONFIG, [3, 4], "cpu"), pairs()
    noise = torch.randn(2, sum(COUNTS), 16)
    text, captions = packed(data)
    padded = [s.float().expand(2, *s.shape) for s in data.states]
    lengths = [n.expand(2, -1) for n in data.lengths]
    found = forward(CONFIG, ensemble.views(ensemble.flat), noise, text.expand(2, -1, -1), padded, lengths)
    for k in range(2):
        with torch.no_grad():
            expected = ensemble.member(k)(noise[k], text, captions)
        torch.testing.assert_close(found[k], expected, atol=1e-5, rtol=1e-5)
    assert (found[0] - found[1]).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_steps_are_the_trainers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A member ends where the trainer's own objective and torch's optimizers end, its data in the same order."""
    settings = Settings(4, sum(COUNTS), kind, 1e-2, warmup=2, clip_gradient=0.5)  # type: ignore[arg-type]
    data, noise = pairs(), torch.randn(4, 1, sum(COUNTS), 16)
    ensemble = Ensemble(CONFIG, [5], "cpu")
    prior = ensemble.member(0).train()
    queue = list(noise)
    monkeypatch.setattr(torch, "randn_like", lambda x: queue.pop(0))
    every = [torch.arange(n)[None] for n in COUNTS]
    training = Training(ensemble, settings, data, every)
    assert training.rows == list(COUNTS)

    linear = [m.weight for m in prior.modules() if isinstance(m, torch.nn.Linear)]
    rest = [p for p in prior.parameters() if p.requires_grad and not any(p is w for w in linear)]
    momentum = [torch.zeros_like(w) for w in linear]
    adam_linear = torch.optim.AdamW([{"params": linear, "weight_decay": 0.01}], lr=1.0)
    adam = torch.optim.AdamW([{"params": rest, "weight_decay": 0.0}], lr=1.0)
    text, captions = packed(data)
    objective = Objective(0.2, 0.01, "mean")
    for step in range(4):
        rate = training.rate_at(step / 4)
        training.step()
        draw = Draw(noise[step, 0], torch.zeros(len(text), 2))
        objective(prior, data.image.float(), text, captions, draw, text, 0)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(prior.parameters(), 0.5)
        for group in (*adam.param_groups, *adam_linear.param_groups):
            group["lr"] = rate
        adam.step()
        if kind == "adamw":
            adam_linear.step()
        for weight, buffer in zip(linear, momentum, strict=True) if kind == "muon" else ():
            assert weight.grad is not None
            buffer.lerp_(weight.grad, 0.05)
            update = orthogonalised(weight.grad.lerp(buffer, 0.95)[None])[0]
            weight.data.mul_(1 - rate * 0.01).sub_(rate * 0.2 * max(weight.shape) ** 0.5 * update)
        prior.zero_grad()
    for name, value in ensemble.member(0, ensemble.flat).state_dict().items():
        if name.endswith("to_k.bias"):  # shifts all scores alike: its gradient is rounding, which AdamW blows up
            continue
        torch.testing.assert_close(value, prior.state_dict()[name], atol=2e-4, rtol=1e-3)


def test_an_epoch_shows_every_pair_once() -> None:
    data = pairs()
    order = orders(data, [0, 1], steps=6, rows=[3, 2, 1, 1])
    for c, count in enumerate(COUNTS):
        assert sorted(order[c][0, :count].tolist()) == list(range(count))
    assert order[0].shape == (2, 18) and not torch.equal(order[0][0], order[0][1])


def test_weights_pass_through_the_trainers_class() -> None:
    ensemble = Ensemble(CONFIG, [1, 2], "cpu")
    torch.manual_seed(9)
    prior = Prior(CONFIG)
    ensemble.load(prior)
    for name, value in ensemble.member(1).state_dict().items():
        torch.testing.assert_close(value, prior.state_dict()[name])
