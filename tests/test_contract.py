"""The contract of a model file. `model_X.py` is found by its name (`--arch X`); no other file has to change for it.

Module level
    CONFIGS {name: dataclass}: "tiny", and published sizes. A config has `image_size`, `cfg`, and the settings of the
        frozen autoencoder under the name that `Model.image_tokenizer` gives; the model has the module under it too.
    RECIPES {config: {stage: {flag: value}}}: flat dictionaries over the defaults of train.py's parser. Stages: "reca"
        and "sft"; "base" where a model is trained from nothing; "plain": RecA on a user's pictures, if it differs.
    The class under its own name, and `Model` = that class, built from (config, tokenizer).

What train.py calls
    trainable_parameters(stage) -> [(name, parameter)]; sets requires_grad and `self.stage`.   no_decay(name, parameter)
    blocks() -> the modules that recomputation and sharding wrap
    preprocess(image, purpose): PIL -> (3, H, W) in [-1, 1]. Training, all of one size: "recon", "t2i", "i2t", the part
        that the picture is for. Inference: "answer", "edit", "reconstruct".
    precompute(images (N, 3, H, W)) -> {name: tensor}: all that is frozen in `self.stage`; never random.
    encoders: the names of the submodules that precompute uses, for the key of --cache (without it: all that is frozen).
    collate(part, samples, generators, shared, pad_to) -> {name: tensor}: what a loss needs besides: token rows,
        randomness (a generator for each sample, `shared` for what a batch has in common) and "count", by which its sum
        is divided. samples: dicts, by part: recon {prompt, drop}; t2i {caption, drop}; i2t and text {question, answer}
        or {turns}; edit {instruction, drop}; in base training also uncond (a t2i row), words {caption}.
    forward({part: tensors}) -> {part: loss}, whatever the mixture, in one forward.

What sample.py and evaluate.py call. generator: None, or one torch.Generator for each row (a list; one row: itself),
    from which all that is random of the row is drawn: it depends on no other. cfg: at least 1, which is no guidance
    generate(prompts, cfg, steps, temperature, generator, size): size in pixels, an int or (H, W); steps: passes
    reconstruct(images, prompt, ...), edit(images, instructions, ...) -> images (B, 3, H, W) in [-1, 1]
    answer(images or None, questions, max_new_tokens, temperature, generator) -> [text]
    load_published(path, config, tokenizer_path, vision_path, tokenizer, device, dtype): strict
    published_state() -> {name: tensor} as the published file of weights has it, also of a model on the meta device
    save_published(folder that exists) -> paths: the files that the original implementation loads, without frozen ones
    trace (optional, for --explain): None; or a list, to which generate, reconstruct and edit of one picture add first
        what stands in the slots of the context, a list: a piece of text, a place (row, column, rows, columns) of the
        picture that is seen, or None; then for each step a dict: picture (1, 3, H, W) so far, masked (h, w) bool, what
        is still open, or None; looks (places drawn, slots): attention of those to these, nan where a place is not
        drawn in this step; title
"""
import inspect

import pytest
import torch
from helpers import untrained
from PIL import Image

import checkpoint
import data
import shape_world
import train

ARCHS = checkpoint.architectures()
PARTS = ("recon", "t2i", "i2t", "edit", "text")

@pytest.fixture(scope="module", params=ARCHS)
def arch(request):
    return request.param

@pytest.fixture(scope="module")
def model(arch):
    return untrained(arch)

def batches(arch, model, stage, parts=PARTS):
    mix = [f"{part}=1" for part in parts]
    args, _ = train.parse_args(["--arch", arch, "--stage", stage, "--batch", "4", "--pool", "16", "--i2t-weight", "1",
                                "--t2i-weight", "1", "--device", "cpu", "--mix", *mix])
    model.trainable_parameters(stage)
    return data.Batches(args, model)

def test_names_recipes_and_signatures(arch):
    file = checkpoint.model_file(arch)
    known = set(vars(train.parser().parse_args([]))) - {"arch", "stage", "config"}
    assert "tiny" in file.CONFIGS and set(file.RECIPES) == set(file.CONFIGS)
    for config, stages in file.RECIPES.items():
        assert {"reca", "sft"} <= set(stages) <= {"base", "reca", "sft", "plain"}, config
        for stage, recipe in stages.items():
            assert set(recipe) <= known, (config, stage, set(recipe) - known)
            assert isinstance(recipe["mix"], dict) and set(recipe["mix"]) <= set(data.PARTS)
    settings = file.CONFIGS["tiny"]
    assert settings.image_size and settings.cfg and getattr(settings, file.Model.image_tokenizer)
    wanted = {
        "collate": ["part", "samples", "generators", "shared", "pad_to"], "preprocess": ["image", "purpose"],
        "precompute": ["images"], "forward": ["batch"], "trainable_parameters": ["stage"], "no_decay": ["name", "p"],
        "blocks": [], "sampling_steps": ["job"], "published_state": [], "save_published": ["folder"],
        "load_published": ["path", "config", "tokenizer_path", "vision_path", "tokenizer", "device", "dtype"],
        "generate": ["prompts", "cfg", "steps", "temperature", "generator", "size"],
        "reconstruct": ["images", "prompt", "cfg", "steps", "temperature", "generator"],
        "edit": ["images", "instructions", "cfg", "steps", "temperature", "generator"],
        "answer": ["images", "questions", "max_new_tokens", "temperature", "generator"]}
    for name, parameters in wanted.items():
        found = [p for p in inspect.signature(getattr(file.Model, name)).parameters if p not in ("self", "cls")]
        assert found[:len(parameters)] == parameters, (name, found)
    for name in ("generate", "reconstruct", "edit"):  # what sample.py writes into pictures
        assert inspect.signature(getattr(file.Model, name)).parameters["temperature"].default == 1.0
    assert file.Model.__module__ == f"model_{arch}" and file.Model.__name__ != "Model"

def test_pictures_of_a_training_purpose_share_a_size(arch, model):
    size = model.config.image_size
    for purpose in ("recon", "t2i", "i2t"):
        shapes = {tuple(model.preprocess(Image.new("RGB", wh, "red"), purpose).shape) for wh in ((60, 40), (70, 90))}
        assert len(shapes) == 1 and shapes.pop()[0] == 3, purpose
    for purpose in ("answer", "edit", "reconstruct", "recon"):
        x = model.preprocess(Image.new("RGB", (size, size), (255, 0, 0)), purpose)
        assert x.min() == -1 and x.max() == 1, purpose

@pytest.mark.parametrize("stage", ["base", "reca"])
def test_batches_and_losses_are_functions_of_their_generators(arch, model, stage):
    first, second = (batches(arch, model, stage).batch(3) for _ in range(2))
    for part in PARTS:
        assert first[part].keys() == second[part].keys()
        assert all(torch.equal(first[part][k], second[part][k]) for k in first[part]), part
        assert first[part]["count"].shape == () and first[part]["count"] > 0
    again = model(first)
    assert all(torch.equal(loss, model(second)[part]) for part, loss in again.items())
    assert all(loss.shape == () and torch.isfinite(loss) for loss in again.values())

def test_any_mixture_gives_the_same_losses(arch, model):
    batch = batches(arch, model, "base", PARTS + ("uncond", "words")).batch(0)
    whole = model(batch)
    assert set(whole) == set(batch)
    for part in batch:
        torch.testing.assert_close(model({part: batch[part]})[part], whole[part])
    halved = {part: tensors | {"count": 2 * tensors["count"]} for part, tensors in batch.items() if "count" in tensors}
    for part, loss in model(halved).items():  # a loss is a sum divided by what it is told
        torch.testing.assert_close(2 * loss, whole[part])

@pytest.mark.parametrize("stage", ["base", "sft", "reca"])
def test_gradients_reach_exactly_what_trains(arch, model, stage):
    batch = batches(arch, model, stage).batch(0)
    named = dict(model.trainable_parameters(stage))
    model.zero_grad(set_to_none=True)
    sum(model(batch).values()).backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == (name in named), name
        assert (p.grad is not None) == (name in named), name
    assert not any(name.startswith(model.image_tokenizer + ".") for name in named)
    model.zero_grad(set_to_none=True)

def test_samplers(arch, model):
    size = model.config.image_size
    pictures = data.to_float(shape_world.Scenes(2, seed=1).render())

    def generator(n=2):
        return [torch.Generator().manual_seed(i) for i in range(n)]
    calls = {"generate": lambda: model.generate(["a red star", "two circles"], cfg=2.0, steps=2, generator=generator()),
             "wide": lambda: model.generate(["a star"], cfg=1.0, steps=2, generator=generator(1),
                                           size=(size, 2 * size)),
             "reconstruct": lambda: model.reconstruct(pictures, steps=2, generator=generator()),
             "edit": lambda: model.edit(pictures, ["Make it red.", "Remove it."], steps=2, generator=generator())}
    for name, call in calls.items():
        out = call()
        assert out.shape == ((1, 3, size, 2 * size) if name == "wide" else (2, 3, size, size)), name
        assert out.abs().max() <= 1 and torch.equal(out, call()), name
    texts = ["Make it red.", "Remove it."]  # what sample.py says was taken unless somebody typed it is taken
    for name, *inputs in (("generate", texts), ("reconstruct", pictures), ("edit", pictures, texts)):
        own = dict(cfg=model.config.cfg, steps=model.sampling_steps(name), temperature=1.0)
        draw = getattr(model, name)
        assert torch.equal(draw(*inputs, generator=generator()), draw(*inputs, generator=generator(), **own)), name
    for images in (pictures, None):
        answers = model.answer(images, ["What?", "Is there a star?"], max_new_tokens=3)
        assert len(answers) == 2 and all(isinstance(answer, str) for answer in answers)

def test_a_trace_tells_how_a_picture_comes_about(arch, model):
    """It changes no picture. What a place looks at are shares; text and places of the source are where they stand."""
    if not hasattr(model, "trace"):
        pytest.skip(f"--arch {arch} has no trace")
    shown = data.to_float(shape_world.Scenes(1, seed=1).render())
    for name, *inputs in (("generate", ["a red star"]), ("reconstruct", shown), ("edit", shown, ["a red star"])):
        def draw():
            return getattr(model, name)(*inputs, cfg=2.0, steps=3, generator=torch.Generator().manual_seed(1))
        plain, model.trace = draw(), []
        traced, (slots, *steps), model.trace = draw(), model.trace, None
        assert torch.equal(plain, traced) and 1 <= len(steps) <= 9, name
        assert torch.equal(steps[-1]["picture"].clamp(-1, 1), traced), name
        places = [slot for slot in slots if isinstance(slot, tuple)]
        assert ("red" in "".join(slot for slot in slots if isinstance(slot, str))) == (name != "reconstruct")
        assert len(set(places)) == (0 if name == "generate" else 9), (name, places)
        for step in steps:
            drawn = step["looks"][~step["looks"].isnan().any(1)]
            assert step["looks"].shape == (9, len(slots)) and len(drawn) and step["title"]
            assert drawn.min() >= 0 and 0.01 < drawn.sum(1).min() and drawn.sum(1).max() < 1 + 1e-5, name
        assert steps[-1]["masked"] is None or not steps[-1]["masked"].any()

def test_blocks(arch, model):
    blocks = model.blocks()
    assert len(blocks) >= model.config.num_layers and len({id(block) for block in blocks}) == len(blocks)

def test_special_strings_in_what_people_write_are_spelled_out(arch, model):
    for text in ("<|im_end|>", "a red star<|endoftext|>", "<|vision_start|>"):
        assert model.encode(text) == model.tokenizer.encode_ordinary(text) != model.tokenizer.encode(text)
    fields = {"t2i": "caption", "recon": "prompt", "edit": "instruction"}
    for part in PARTS:
        ends = []
        for text in ("star", "<|im_end|>"):
            sample = {fields[part]: text} if part in fields else {"question": text, "answer": text}
            row = model.collate(part, [sample], [torch.Generator()], torch.Generator(), 0)["ids"]
            ends.append((row == model.tokenizer.special["<|im_end|>"]).sum())
        assert ends[0] == ends[1], part

@pytest.fixture(scope="module")
def shipped(arch):
    return checkpoint.load_model(arch, checkpoint.default_weights(arch, "base"))

def sampled(model, name, rows, **options):
    """Pictures of these rows of five, each with its own noise."""
    prompts = ["a red star", "two blue circles", "a star", "a green square above a red star", "three crosses"]
    orders = ["Make it red.", "Remove the star.", "Make it blue.", "Make the background black.", "Add a blue circle."]
    generators = [data.sample_generator(1, i, 0, "picture") for i in rows]
    shown = data.to_float(shape_world.Scenes(5, seed=1).render()[list(rows)])
    inputs = {"generate": [[prompts[i] for i in rows]], "reconstruct": [shown],
              "edit": [shown, [orders[i] for i in rows]]}
    with torch.no_grad():
        return getattr(model, name)(*inputs[name], generator=generators, **options)

@pytest.mark.parametrize("name", ["generate", "reconstruct", "edit"])
def test_a_picture_depends_on_its_generator_alone(shipped, name):
    five, alone, pair = (sampled(shipped, name, rows) for rows in ((0, 1, 2, 3, 4), (2,), (4, 2)))
    assert (five[2] - alone[0]).abs().max() < 1e-3 and (pair[1] - alone[0]).abs().max() < 1e-3
    assert (five[0] - five[1]).abs().mean() > 0.01
    with pytest.raises(ValueError, match="1 generators for 5 rows"):
        shipped.generate(["a"] * 5, generator=torch.Generator())

@pytest.mark.parametrize("name", ["generate", "reconstruct", "edit"])
def test_no_guidance_and_very_little_give_the_same(shipped, name):
    none, little = (sampled(shipped, name, range(5), cfg=cfg) for cfg in (1.0, 1.0001))
    assert (none - little).abs().mean() < 0.02
    for cfg in (0.0, 0.999, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="^cfg .* at least 1, and 1 is none$"):
            sampled(shipped, name, (0,), cfg=cfg)

def test_drawn_answers_do_not_depend_on_their_neighbors(shipped):
    questions = ["What color is the star?", "How many objects are there?", "Is there a star?"]

    def ask(rows):
        generators = [data.sample_generator(1, i, 0) for i in rows]
        return shipped.answer(None, [questions[i] for i in rows], 5, temperature=1.5, generator=generators)
    assert ask((0, 1, 2))[1] == ask((1,))[0] == ask((2, 1))[1]

def rows_of(model, samples, pad_to=None, part="text"):
    generators = [torch.Generator() for _ in samples]
    return model.collate(part, samples, generators, torch.Generator(), pad_to)

def ends(model, labels):
    """How many labels of each row end a text."""
    special = {model.tokenizer.special[name] for name in ("<|im_end|>", "<|endoftext|>")}
    return [sum(int(label) in special for label in row) for row in labels]

@pytest.mark.parametrize("part", ["i2t", "text"])
def test_a_text_that_is_cut_has_no_end(model, part):
    whole, long = {"question": "what?", "answer": "a red star"}, {"question": "what?", "answer": "red star " * 900}
    lost = {"question": "red star " * 900, "answer": "red"}
    for pad_to in (None, 32):
        out = rows_of(model, [whole, long, lost], pad_to, part)
        assert ends(model, out["labels"]) == [1, 0, 0]
        counts = (out["labels"] != -100).sum(1)
        assert counts[1] > 9 and counts[2] == 0 and out["count"] == counts.sum()
    assert rows_of(model, [lost], 32, part)["labels"].shape[0] == 1  # a batch of nothing but such rows

def test_dialogues_keep_whole_turns(model):
    turns = [("what color is the star?", f"answer {i} is red") for i in range(60)]
    some = [rows_of(model, [{"turns": turns[:n]}], 60) for n in range(1, 5)]
    cut = rows_of(model, [{"turns": turns}], 60)
    kept = ends(model, cut["labels"])[0]
    assert 2 <= kept < 10 and kept == max(ends(model, out["labels"])[0] for out in some)
    assert cut["count"] == some[kept - 1]["count"] and torch.equal(cut["ids"], some[kept - 1]["ids"])
    first = rows_of(model, [{"turns": [("what?", "red star " * 900), ("what?", "red")]}], 60)
    assert ends(model, first["labels"]) == [0] and first["count"] > 9

def test_samplers_spell_special_strings_out(model, monkeypatch):
    """None of the ways in encodes what people write with special tokens."""
    def never(text):
        raise AssertionError(f"parsed: {text}")
    monkeypatch.setattr(model.tokenizer, "encode", never)
    bad, image = "<|im_end|>", data.to_float(shape_world.Scenes(1, seed=1).render())
    model.generate([bad], steps=1)
    model.reconstruct(image, bad, steps=1)
    model.edit(image, [bad], steps=1)
    model.answer(image, [bad], max_new_tokens=2)
    model.answer(None, [bad], max_new_tokens=2)
    if "think" in inspect.signature(model.answer).parameters:
        model.answer(image, [bad], max_new_tokens=2, think=True)
