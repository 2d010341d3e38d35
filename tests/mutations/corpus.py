"""Seeded regressions: small edits of small models, each of which makes training need more memory.

A regression replaces text in one file of :data:`FOLDER`. ``culprit`` lists the lines (unique parts of them,
in the edited file) that are a right answer beside those which the edit itself wrote: where the edit is a
number that is used elsewhere, the line that made the tensors which grew.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parent / "models"
SETTINGS: Final = "ciuic.toml"


@dataclass(frozen=True)
class Regression:
    """One edit that needs more memory.

    Attributes:
        name: what was done, unique.
        entry: of ciuic.toml, that is to be flagged.
        file: of the folder, that is edited.
        edits: (old text, new text) in order; each old text occurs exactly once.
        culprit: parts of lines of a model's file that are a right answer too.
    """

    name: str
    entry: str
    file: str
    edits: tuple[tuple[str, str], ...]
    culprit: tuple[str, ...] = ()

    def apply(self, text: str) -> str:
        """The edited text.

        Raises:
            ValueError: an old text is not there exactly once.
        """
        for old, new in self.edits:
            if text.count(old) != 1:
                raise ValueError(f"{self.name}: {old!r} is {text.count(old)} times in {self.file}, not once")
            text = text.replace(old, new)
        return text

    def lines(self, original: str, edited: str) -> set[int]:
        """Numbers of the lines of ``edited`` that are a right answer.

        Raises:
            ValueError: a culprit is not the part of exactly one line.
        """
        known = set(original.splitlines())
        right = {n for n, line in enumerate(edited.splitlines(), 1) if line not in known}
        for part in self.culprit:
            found = [n for n, line in enumerate(edited.splitlines(), 1) if part in line]
            if len(found) != 1:
                raise ValueError(f"{self.name}: {part!r} is in lines {found} of {self.file}, not in one")
            right |= set(found)
        return right


def _of(model: str, name: str, *edits: tuple[str, str], culprit: tuple[str, ...] = ()) -> Regression:
    return Regression(f"{model}: {name}", model, f"{model}.py", edits, culprit)


_GPT_BY_HAND = (
    "        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)\n",
    "        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5\n"
    "        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)\n"
    "        weights = scores.masked_fill(future, float('-inf')).softmax(-1)\n"
    "        y = weights @ v\n",
)

GPT: Final = (
    _of("gpt", "bigger batch", ("BATCH = 8", "BATCH = 10"), culprit=("def make()", "ids = torch.randint(")),
    _of(
        "gpt",
        "longer sequence",
        ("LENGTH = 512", "LENGTH = 640"),
        culprit=("def make()", "ids = torch.randint("),
    ),
    _of(
        "gpt",
        "wider feed-forward",
        ("nn.Linear(width, 4 * width)", "nn.Linear(width, 6 * width)"),
        ("nn.Linear(4 * width, width)", "nn.Linear(6 * width, width)"),
        culprit=("hidden = self.up(x)",),
    ),
    _of("gpt", "wider model", ("WIDTH = 512", "WIDTH = 640"), culprit=("hidden = self.up(x)",)),
    _of(
        "gpt", "one more layer", ("LAYERS = 2", "LAYERS = 3"), culprit=("x = block(x)", "hidden = self.up(x)")
    ),
    _of(
        "gpt",
        "gated activation",
        (
            "        self.down = nn.Linear(4 * width, width)\n",
            "        self.down = nn.Linear(4 * width, width)\n"
            "        self.gate = nn.Linear(width, 4 * width)\n",
        ),
        ("hidden = F.gelu(hidden)", "hidden = F.gelu(hidden) * self.gate(x)"),
    ),
    _of("gpt", "logits upcast", ("logits = self.head(x)", "logits = self.head(x).float()")),
    _of("gpt", "attention by hand", _GPT_BY_HAND),
    _of(
        "gpt",
        "mask materialised",
        (
            "        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)\n",
            "        far = torch.arange(length, device=x.device)\n"
            "        bias = (far - far[:, None]).to(x.dtype) * 0.1\n"
            "        bias = bias.expand(batch, self.heads, length, length).contiguous()\n"
            "        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)\n",
        ),
    ),
    _of(
        "gpt",
        "logits returned",
        ('return {"loss": loss}', 'return {"loss": loss, "logits": logits}'),
        culprit=("logits = self.head(x)",),
    ),
    _of(
        "gpt",
        "hidden states returned",
        (
            "        for block in self.blocks:\n            x = block(x)\n",
            "        hidden = []\n"
            "        for block in self.blocks:\n"
            "            x = block(x)\n"
            "            hidden.append(x * 1.0)\n",
        ),
        ('return {"loss": loss}', 'return {"loss": loss, "hidden": hidden}'),
    ),
    _of(
        "gpt",
        "graph break by item",
        (
            "            x = block(x)\n",
            "            x = block(x)\n            self.largest = x.abs().max().item()\n",
        ),
    ),
    _of(
        "gpt",
        "tied weight lost",
        ("        self.head.weight = self.tokens.weight\n", ""),
        culprit=(
            "logits = self.head(x)",
            "self.head = nn.Linear(",
            "x = self.tokens(ids) + self.positions(positions)",
        ),
    ),
    _of(
        "gpt",
        "float32",
        ("GPT().to(torch.bfloat16)", "GPT()"),
        culprit=("x = self.tokens(ids) + self.positions(positions)", "hidden = self.up(x)"),
    ),
    _of(
        "gpt",
        "dropout by hand",
        (
            "hidden = F.gelu(hidden)",
            "hidden = F.gelu(hidden)\n"
            "        kept = torch.empty_like(hidden).bernoulli_(0.9)\n"
            "        hidden = hidden * kept / 0.9",
        ),
    ),
    _of(
        "gpt",
        "queries and keys normalised",
        (
            "        q, k, v = qkv.permute(2, 0, 3, 1, 4)\n",
            "        q, k, v = qkv.permute(2, 0, 3, 1, 4)\n"
            "        q = F.layer_norm(q, q.shape[-1:])\n"
            "        k = F.layer_norm(k, k.shape[-1:])\n",
        ),
    ),
    _of(
        "gpt",
        "targets one-hot",
        (
            "loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())",
            "wanted = F.one_hot(targets, logits.shape[-1]).to(logits.dtype)\n"
            "        loss = -(logits.log_softmax(-1) * wanted).sum(-1).mean()",
        ),
    ),
    _of(
        "gpt",
        "larger vocabulary",
        ("vocabulary=4096", "vocabulary=8192"),
        culprit=("logits = self.head(x)", "loss = F.cross_entropy("),
    ),
)

LLAMA: Final = (
    _of(
        "llama",
        "checkpoint lost",
        ("checkpoint(self.mlp, self.norm2(x), use_reentrant=False)", "self.mlp(self.norm2(x))"),
        culprit=("gate = self.gate(x)", "up = self.up(x)"),
    ),
    _of("llama", "residual stream in float32", ("x = self.tokens(ids)", "x = self.tokens(ids).float()")),
    _of(
        "llama",
        "attention in float32",
        (
            "        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)\n",
            "        q, k, v = q.float(), k.float(), v.float()\n"
            "        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)\n"
            "        y = y.to(x.dtype)\n",
        ),
    ),
    _of(
        "llama",
        "keys and values repeated",
        (
            "        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)\n",
            "        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)\n"
            "        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)\n"
            "        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)\n",
        ),
    ),
    _of(
        "llama",
        "bigger batch",
        ("batch, length = 4, 1024", "batch, length = 6, 1024"),
        culprit=("def make()", "return model, (torch.randint("),
    ),
    _of(
        "llama",
        "longer sequence",
        ("batch, length = 4, 1024", "batch, length = 4, 1280"),
        culprit=("def make()", "return model, (torch.randint("),
    ),
    _of(
        "llama",
        "wider feed-forward",
        ("hidden=1536", "hidden=3072"),
        culprit=("gate = self.gate(x)", "up = self.up(x)", "return self.down(F.silu(gate) * up)"),
    ),
    _of(
        "llama",
        "one more layer",
        ("layers=2", "layers=3"),
        culprit=(
            "x = block(x, cos, sin)",
            "x = x + self.attention(self.norm1(x), cos, sin)",
            "x = x + checkpoint(",
            "q = rotate(q, cos, sin)",
        ),
    ),
    _of(
        "llama",
        "larger vocabulary",
        ("vocabulary=4096", "vocabulary=6144"),
        culprit=("return self.head(self.norm(x))", "return F.cross_entropy("),
    ),
    _of(
        "llama",
        "logits upcast",
        ("return self.head(self.norm(x))", "return self.head(self.norm(x)).float()"),
    ),
    _of(
        "llama",
        "more groups",
        ("groups=2", "groups=8"),
        culprit=("k = self.k(x)", "v = self.v(x)", "k = rotate(k, cos, sin)"),
    ),
    _of(
        "llama",
        "graph break by a branch on data",
        (
            "            x = block(x, cos, sin)\n",
            "            x = block(x, cos, sin)\n"
            "            if x.abs().max() > 1e4:\n"
            "                x = x.clamp(-1e4, 1e4)\n",
        ),
    ),
    _of(
        "llama",
        "attention by hand",
        (
            "        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)\n",
            "        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)\n"
            "        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)\n"
            "        weights = (q @ k.mT * self.size**-0.5).softmax(-1)\n"
            "        y = weights @ v\n",
        ),
    ),
)

CONVNET: Final = (
    _of("convnet", "SiLU for ReLU", ("branch = F.relu(branch)", "branch = F.silu(branch)")),
    _of("convnet", "GELU for ReLU after the sum", ("return F.relu(image)\n", "return F.gelu(image)\n")),
    _of(
        "convnet",
        "stem without stride",
        ("ConvNorm(3, channels[0], stride=2)", "ConvNorm(3, channels[0], stride=1)"),
        culprit=("image = self.conv(image)",),
    ),
    _of(
        "convnet",
        "bigger batch",
        ("torch.randn(32, 3, 224, 224)", "torch.randn(40, 3, 224, 224)"),
        culprit=("def make()",),
    ),
    _of(
        "convnet",
        "larger images",
        ("torch.randn(32, 3, 224, 224)", "torch.randn(32, 3, 256, 256)"),
        culprit=("def make()",),
    ),
    _of(
        "convnet",
        "more channels",
        ("channels=(32, 64)", "channels=(48, 64)"),
        culprit=("image = self.conv(image)", "return self.norm(image)"),
    ),
    _of(
        "convnet",
        "deeper",
        ("depth=1", "depth=2"),
        culprit=("image = self.conv(image)", "image = stage(image)", "return self.norm(image)"),
    ),
    _of(
        "convnet",
        "squeeze and excitation",
        (
            "        self.second = ConvNorm(channels, channels)\n",
            "        self.second = ConvNorm(channels, channels)\n"
            "        self.excite = nn.Linear(channels, channels)\n",
        ),
        (
            "        branch = self.second(branch)\n",
            "        branch = self.second(branch)\n"
            "        scale = self.excite(branch.mean((2, 3))).sigmoid()\n"
            "        branch = branch * scale[:, :, None, None]\n",
        ),
    ),
    _of(
        "convnet",
        "flattened features",
        ("features = image.mean((2, 3))", "features = image.flatten(1)"),
        ("nn.Linear(previous, classes)", "nn.Linear(previous * 28 * 28, classes)"),
        culprit=("return self.head(features)",),
    ),
    _of(
        "convnet",
        "upsampled branch",
        (
            "        branch = self.second(branch)\n",
            "        branch = F.interpolate(branch, scale_factor=2.0)\n"
            "        branch = F.avg_pool2d(self.second(branch), 2)\n",
        ),
        culprit=("image = self.conv(image)",),
    ),
    _of(
        "convnet",
        "double precision",
        ("ConvNet().train()", "ConvNet().double()"),
        ("torch.randn(32, 3, 224, 224)", "torch.randn(32, 3, 224, 224, dtype=torch.double)"),
        culprit=("image = self.conv(image)",),
    ),
)

VIT: Final = (
    _of(
        "vit",
        "smaller patches",
        ("size=16", "size=14"),
        culprit=("patches = self.project(images)", "x = self.rise(x)"),
    ),
    _of("vit", "wider feed-forward", ("ratio=4", "ratio=6"), culprit=("x = self.rise(x)",)),
    _of("vit", "one more layer", ("depth=2", "depth=3"), culprit=("x = self.rise(x)", "self.layers(tokens)")),
    _of("vit", "bigger batch", ("batch = 64", "batch = 80"), culprit=("def make()", "images = torch.randn(")),
    _of(
        "vit",
        "attention by hand",
        (
            "        attended = F.scaled_dot_product_attention(query, key, value)\n",
            "        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5\n"
            "        attended = scores.softmax(-1) @ value\n",
        ),
    ),
    _of(
        "vit",
        "attended tokens kept on the module",
        (
            "        return self.output(attended.transpose(1, 2).flatten(2))\n",
            "        mixed = self.output(attended.transpose(1, 2).flatten(2))\n"
            "        self.last = (mixed - x).abs()\n"
            "        return mixed\n",
        ),
    ),
    _of(
        "vit",
        "register tokens",
        (
            "        self.project = nn.Conv2d(3, width, size, stride=size)\n",
            "        self.project = nn.Conv2d(3, width, size, stride=size)\n"
            "        self.registers = nn.Parameter(torch.zeros(1, 32, width))\n",
        ),
        (
            "        return patches + self.positions\n",
            "        registers = self.registers.expand(patches.shape[0], -1, -1)\n"
            "        return torch.cat((patches + self.positions, registers), 1)\n",
        ),
        culprit=("x = self.rise(x)",),
    ),
    _of(
        "vit",
        "gated feed-forward",
        (
            "        self.fall = nn.Linear(ratio * width, width)\n",
            "        self.fall = nn.Linear(ratio * width, width)\n"
            "        self.gate = nn.Linear(width, ratio * width)\n",
        ),
        (
            '        x = self.rise(x)\n        x = F.gelu(x, approximate="tanh")\n',
            "        gate = self.gate(x)\n        x = self.rise(x)\n        x = F.silu(x) * gate\n",
        ),
    ),
    _of(
        "vit",
        "float32",
        ("dtype=torch.bfloat16", "dtype=torch.float32"),
        ("ViT().bfloat16()", "ViT()"),
        culprit=("x = self.rise(x)", "patches = self.project(images)"),
    ),
    _of(
        "vit",
        "norm after the feed-forward's first layer",
        (
            "        x = self.rise(x)\n",
            "        x = self.rise(x)\n        x = F.layer_norm(x, x.shape[-1:])\n",
        ),
    ),
)

MOE: Final = (
    _of(
        "moe",
        "higher capacity",
        ("CAPACITY = 1.0", "CAPACITY = 1.5"),
        culprit=("hidden = F.relu(self.enter(tokens))", "mixed = expert(tokens[chosen])"),
    ),
    _of(
        "moe",
        "every token to every expert",
        ("take = int(CAPACITY * tokens.shape[0]) // EXPERTS", "take = tokens.shape[0]"),
        culprit=("hidden = F.relu(self.enter(tokens))", "mixed = expert(tokens[chosen])"),
    ),
    _of(
        "moe",
        "more experts",
        ("EXPERTS = 4", "EXPERTS = 8"),
        culprit=("hidden = F.relu(self.enter(tokens))", "mixed = expert(tokens[chosen])"),
    ),
    _of("moe", "GELU for ReLU", ("F.relu(self.enter(tokens))", "F.gelu(self.enter(tokens))")),
    _of(
        "moe",
        "one-hot dispatch",
        (
            "            mixed = expert(tokens[chosen])\n",
            "            dispatch = F.one_hot(chosen, tokens.shape[0]).to(x.dtype)\n"
            "            mixed = expert(dispatch @ tokens)\n",
        ),
    ),
    _of(
        "moe",
        "bigger batch",
        ("torch.zeros(8, 512", "torch.zeros(10, 512"),
        culprit=("def make()", "return model, {"),
    ),
    _of(
        "moe",
        "wider experts",
        ("hidden=2048", "hidden=3072"),
        culprit=("hidden = F.relu(self.enter(tokens))",),
    ),
    _of(
        "moe",
        "one more layer",
        ("layers=1", "layers=2"),
        culprit=("hidden = F.relu(self.enter(tokens))", "x = layer(x)"),
    ),
    _of(
        "moe",
        "logits upcast",
        ("logits = self.unembed(self.norm(x))", "logits = self.unembed(self.norm(x)).float()"),
    ),
    _of(
        "moe",
        "graph break in the layer",
        (
            "        return x + self.mixture(self.norm2(x))\n",
            "        torch._dynamo.graph_break()\n        return x + self.mixture(self.norm2(x))\n",
        ),
    ),
    _of(
        "moe",
        "experts' outputs stacked",
        (
            "            result = result.index_add(0, chosen, mixed)\n        return result.view_as(x)\n",
            "            placed = torch.zeros_like(tokens).index_add(0, chosen, mixed)\n"
            "            outputs.append(placed)\n"
            "        return torch.stack(outputs).square().sum(0).sqrt().view_as(x)\n",
        ),
        ("        result = torch.zeros_like(tokens)\n", "        outputs = []\n"),
    ),
)


def _compressed(name: str, *edits: tuple[str, str], culprit: tuple[str, ...] = ()) -> Regression:
    return Regression(f"gpt-compressed: {name}", "gpt-compressed", "gpt.py", edits, culprit)


COMPRESSED: Final = (
    _compressed(
        "the feed-forward renamed away from the option allow",
        ("        self.mlp = FeedForward(width)\n", "        self.ffn = FeedForward(width)\n"),
        ("x = x + self.mlp(self.norm2(x))", "x = x + self.ffn(self.norm2(x))"),
        culprit=("hidden = self.up(x)", "hidden = F.gelu(hidden)"),
    ),
    _compressed("attention by hand", _GPT_BY_HAND),
    _compressed(
        "an activation that must stay exact",
        ("hidden = F.gelu(hidden)", "hidden = torch.log1p(hidden.abs()) * hidden.sign()"),
        culprit=("hidden = self.up(x)",),
    ),
    _compressed("logits upcast", ("logits = self.head(x)", "logits = self.head(x).float()")),
    Regression(
        "gpt-compressed: the option deny",
        "gpt-compressed",
        SETTINGS,
        (('allow = ["*mlp*", "*attention*"]', 'allow = ["*attention*"]'),),
        ("hidden = self.up(x)", "hidden = F.gelu(hidden)"),
    ),
    Regression(
        "gpt-compressed: mode 2:1",
        "gpt-compressed",
        SETTINGS,
        (('mode = "4:1"', 'mode = "1.5:1"'),),
        ("hidden = self.up(x)", "hidden = F.gelu(hidden)"),
    ),
)

REGRESSIONS: Final[tuple[Regression, ...]] = (*GPT, *LLAMA, *CONVNET, *VIT, *MOE, *COMPRESSED)
