"""The models here as a plug-in of lmms-eval, whose tasks then need no file of this repository. No other file imports
this one, and it alone imports that package (0.7.3), which finds it by its entry point in pyproject.toml:

    pip install -e ".[lmms-eval]"
    lmms-eval eval --model nanoreca --model_args arch=mar,ckpt=runs/mar-reca --tasks pope,mmmu_val --batch_size 16
    torchrun --nproc_per_node=8 -m lmms_eval --model nanoreca --model_args arch=diffusion,config=bagel-7b-mot,...

--model_args takes the flags of sample.py that say which model, as key=value: arch, config, ckpt, tokenizer_ckpt,
text_tokenizer, vision_ckpt, rest_ckpt, weights, dtype, gemm, lora; and seed, for tasks with a temperature. Start it
outside of this folder: lmms-eval needs another package of the name `evaluate`.

VLMEvalKit has no entry points; this, run in its folder instead of run.py and with the same flags, adds a model:

    import runpy
    from functools import partial
    import checkpoint, data, vlmeval.config
    from vlmeval.vlm.base import BaseModel

    class NanoRecA(BaseModel):
        INTERLEAVE = False

        def __init__(self, arch, ckpt=None, device="cuda", **options):  # options of checkpoint.load_model
            self.model, self.device = checkpoint.load_model(arch, ckpt, device=device, **options), device

        def generate_inner(self, message, dataset=None):
            text = "\\n".join(part["value"] for part in message if part["type"] == "text")
            paths = [part["value"] for part in message if part["type"] == "image"]
            pictures = [self.model.preprocess(data.open_image(path), "answer")[None].to(self.device) for path in paths]
            return self.model.answer(pictures[0] if pictures else None, [text], max_new_tokens=128)[0]

    vlmeval.config.supported_VLM["nanoreca"] = partial(NanoRecA, "mar", "runs/mar-reca")
    runpy.run_path("run.py", run_name="__main__")
"""
import argparse
import sys
from collections import Counter

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm

import checkpoint
import data

MANIFEST = ModelManifest("nanoreca", simple_class_path="lmms_eval_adapter.NanoRecA")  # what the entry point names
SETTINGS = {"max_new_tokens", "temperature", "do_sample", "until"}  # of a task, that a model here has

class NanoRecA(lmms):
    """Answers questions about pictures, as lmms-eval's simple models do. One with several pictures is asked about the
    first, one without any as a text; both are counted. device: None is a GPU for each process, where there are GPUs."""

    def __init__(self, batch_size=1, device=None, max_batch_size=None, lora=None, seed=0, **flags):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"--batch_size {batch_size}: must be a number of questions answered at once, from 1")
        parser = argparse.ArgumentParser("nanoreca", usage="--model_args FLAG=VALUE,...", allow_abbrev=False)
        checkpoint.add_flags(parser)
        args = parser.parse_args([f"--{name.replace('_', '-')}={value}" for name, value in flags.items()])
        args.adapters = lora
        checkpoint.choose(args)
        self.accelerator = Accelerator(cpu=device == "cpu")  # by which lmms-eval gathers the answers of all processes
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        args.device = str(self.accelerator.device if device in (None, "cuda") else device)
        self.device, self.seed, self.batch_size = args.device, seed, int(batch_size)
        self.model = checkpoint.model_of(args)

    @torch.inference_mode()
    def generate_until(self, requests):
        """-> an answer to each request, up to its first `until`; greedy, unless its task has a temperature."""
        answers, remarks = [], Counter()
        for start in tqdm(range(0, len(requests), self.batch_size), "answers", disable=self.rank > 0):
            answers += self.batch([request.args for request in requests[start:start + self.batch_size]], remarks)
        for what, count in remarks.items():
            print(f"nanoreca: process {self.rank}: {count} of {len(requests)} questions {what}", file=sys.stderr)
        return answers

    def batch(self, rows, remarks):
        """Arguments of some requests -> their answers. Rows whose pictures have one size are answered at once."""
        groups, answers = {}, [""] * len(rows)
        for place, (question, settings, look, doc_id, task, split) in enumerate(rows):
            picture = self.picture(look(self.task_dict[task][split][doc_id]), f"{task}, question {doc_id}", remarks)
            for name in sorted(settings.keys() - SETTINGS):
                if settings[name] not in (None, False, 1):  # which ask for nothing
                    remarks[f"are to have {name} {settings[name]}, which no model here knows"] += 1
            heat = float(settings.get("temperature") or 0) * (settings.get("do_sample") is not False)
            own = data.sample_generator(self.seed, doc_id, 0, task)
            key = None if picture is None else picture.shape, settings.get("max_new_tokens") or 128, heat
            question = question.replace("<image>", "").strip()  # every model has its own place for the picture
            groups.setdefault(key, []).append((place, question, picture, own))
        for (shape, length, heat), group in groups.items():
            places, questions, pictures, generators = zip(*group)
            images = None if shape is None else torch.stack(pictures).to(self.device)  # (B, 3, H, W)
            texts = self.model.answer(images, list(questions), length, heat, list(generators))
            for place, text in zip(places, texts):
                until = rows[place][1].get("until") or []
                for end in [until] if isinstance(until, str) else until:
                    text = text.split(end)[0] if end else text
                answers[place] = text.strip()
        return answers

    def picture(self, shown, name, remarks):
        """What a task shows with a question: PIL images -> the first as the model wants it (3, H, W), or None. Raises
        ValueError for a film or a sound."""
        if not shown:
            remarks["have no picture and were answered as texts"] += 1
            return None
        if not all(isinstance(picture, Image.Image) for picture in shown):
            kinds = ", ".join(sorted({type(picture).__name__ for picture in shown}))
            raise ValueError(f"{name}: shows {kinds}, expected PIL images: choose tasks about pictures")
        if len(shown) > 1:
            remarks["have several pictures and were answered from the first"] += 1
        return self.model.preprocess(data.as_rgb(shown[0]), "answer")

    def loglikelihood(self, requests):
        raise NotImplementedError("nanoreca has no loglikelihood: choose tasks of output_type generate_until")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("nanoreca has no dialogues: choose tasks of output_type generate_until")
