"""Compares our model class for lm-evaluation-harness with the class `hf` on an exported folder, example by example.

Run by hand, in an environment with this package, lm_eval, torch and transformers. The task and its data are made here:
nothing comes from a hub.

  python scripts/check_lm_eval.py RUN EXPORTED

Prints for each kind of request how many examples agree: log-probabilities within TOLERANCE, greedy flags and generated
texts exactly, and the accuracy of a task with choices. Exit code 1 if anything differs.
"""

import json
import pathlib
import sys
import tempfile

import lm_eval
import numpy as np
import sentencepiece
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, PreTrainedTokenizer

from pretrain.benchmarks.harness import harness_model
from pretrain.evaluation.writer import open_writer

TOLERANCE = 2e-4  # nats, of a whole continuation
WORDS = [
  'the', 'License', 'Work', 'of', 'any', 'such', 'person', 'shall', 'mean', 'and', 'or', 'copyright', 'Contribution',
  'to', 'reproduce', 'each',
]  # fmt: skip


class PlainTokenizer(PreTrainedTokenizer):
  """The SentencePiece model of an exported folder; no token is added."""

  def __init__(self, folder: pathlib.Path):
    self.model = sentencepiece.SentencePieceProcessor(model_file=str(folder / 'tokenizer.model'))
    super().__init__(bos_token='<pad>', eos_token='</s>', pad_token='<pad>', unk_token='<unk>')

  @property
  def vocab_size(self) -> int:
    return len(self.model)

  def get_vocab(self) -> dict[str, int]:
    return {self.model.id_to_piece(i): i for i in range(len(self.model))}

  def _tokenize(self, text: str, **_) -> list[str]:
    return self.model.encode(text, out_type=str)

  def _convert_token_to_id(self, token: str) -> int:
    return self.model.piece_to_id(token)

  def _convert_id_to_token(self, index: int) -> str:
    return self.model.id_to_piece(index) if index < len(self.model) else '<unk>'

  def convert_tokens_to_string(self, tokens: list[str]) -> str:
    return tokens[0] if tokens == [self.eos_token] else self.model.decode(tokens)


def questions(number: int) -> list[dict]:
  rng = np.random.default_rng(0)
  phrase = lambda least, most: ' '.join(rng.choice(WORDS, rng.integers(least, most)))
  return [
    {'context': phrase(1, 12), 'choices': [phrase(1, 6) for _ in range(4)], 'answer': int(rng.integers(4))}
    for _ in range(number)
  ]


def task_folder(folder: pathlib.Path, number: int) -> pathlib.Path:
  lines = ''.join(json.dumps(each) + '\n' for each in questions(number))
  (folder / 'test.jsonl').write_text(lines)
  (folder / 'local_choice.yaml').write_text(
    'task: local_choice\ndataset_path: json\n'
    f'dataset_kwargs: {{data_files: {{test: {folder}/test.jsonl}}}}\n'
    'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{context}}"\ndoc_to_choice: "{{choices}}"\n'
    'doc_to_target: "{{answer}}"\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n'
  )
  return folder


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
  return [Instance(request_type=kind, doc={}, arguments=own, idx=i) for i, own in enumerate(arguments)]


def accuracy(model, folder: pathlib.Path) -> dict:
  found = lm_eval.simple_evaluate(
    model=model, tasks=['local_choice'], task_manager=TaskManager(include_path=str(folder)), bootstrap_iters=0,
    log_samples=True,
  )  # fmt: skip
  samples = sorted(found['samples']['local_choice'], key=lambda sample: sample['doc_id'])
  return {'acc': [own['acc'] for own in samples], 'acc_norm': [own['acc_norm'] for own in samples]}


def compare(ours, theirs, folder: pathlib.Path, number: int) -> bool:
  asked = questions(number)
  pairs = requests(
    'loglikelihood', [(q['context'] if i % 7 else '', f' {q["choices"][0]}') for i, q in enumerate(asked)]
  )
  texts = requests('loglikelihood_rolling', [(' '.join(q['choices'] * (1 + i % 9)),) for i, q in enumerate(asked)])
  options = {'until': ['of', 'se'], 'max_gen_toks': 12, 'do_sample': False}  # a line end is no token of this model
  prompts = requests('generate_until', [(q['context'], options) for q in asked])
  a, b = ours.loglikelihood(pairs), theirs.loglikelihood(pairs)
  worst = max(abs(x[0] - y[0]) for x, y in zip(a, b, strict=True))
  flags = sum(x[1] == y[1] for x, y in zip(a, b, strict=True))
  print(f'loglikelihood: {len(a)} examples, worst difference {worst:.1e} nats, {flags} greedy flags agree')
  c, d = ours.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts)
  rolling = max(abs(x - y) for x, y in zip(c, d, strict=True))
  print(f'loglikelihood_rolling: {len(c)} texts, worst difference {rolling:.1e} nats')
  e, f = ours.generate_until(prompts), theirs.generate_until(prompts)
  same = sum(x.strip() == y.strip() for x, y in zip(e, f, strict=True))
  print(f'generate_until: {same} of {len(e)} texts are equal, {len(set(e))} are different from each other')
  one, two = accuracy(ours, folder), accuracy(theirs, folder)
  hits = {key: (np.mean(one[key]), np.mean(two[key]), one[key] == two[key]) for key in one}
  print(
    'local task:', ', '.join(f'{k} {x:.3f} and {y:.3f}, each example equal: {same}' for k, (x, y, same) in hits.items())
  )
  return max(worst, rolling) < TOLERANCE and flags == len(a) and same == len(e) and all(x[2] for x in hits.values())


def main(workdir: str, exported: str, number: int = 60) -> int:
  writer, folder = open_writer(pathlib.Path(workdir)), pathlib.Path(exported)
  length = writer.cfg.data.targets_length
  model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation='eager')
  theirs = HFLM(pretrained=model, tokenizer=PlainTokenizer(folder), max_length=length, batch_size=8, prefix_token_id=0)
  ours = harness_model(writer, max_length=length, starts=False)
  with tempfile.TemporaryDirectory() as temporary:
    return int(not compare(ours, theirs, task_folder(pathlib.Path(temporary), number), number))


if __name__ == '__main__':
  sys.exit(main(*sys.argv[1:]))
