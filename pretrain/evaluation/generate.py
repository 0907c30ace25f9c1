"""`pretrain generate`: fills blanks or continues text with a step of a run."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence

from data.arguments import is_text
from data.batches.batches import DataSource
from data.errors import DataError
from pretrain.devices.mesh import MeshConfig
from pretrain.errors import ConfigError, UserError
from pretrain.evaluation.best import Candidate, best_outputs
from pretrain.evaluation.outputs import GREEDY, Decoding, check_decoding, outputs
from pretrain.evaluation.prompts import check_special, named, not_utf8, prompt_inputs, reading_special, room_for
from pretrain.evaluation.texts import answers_whole, filled
from pretrain.evaluation.writer import ONE_DEVICE, Readable, Writer, open_run
from pretrain.experiment.experiment import Experiment
from pretrain.records.progress import Counter
from pretrain.redact import redact
from pretrain.workdirs.folder import Folder

MOST_TOP = 64


@dataclasses.dataclass(frozen=True)
class Generated:
  """`output` is what the decoder wrote; `text` is the prompt with its blanks filled, or continued, or its answer.

  A blank that `output` does not fill stays in `text`; spaces around a blank are those of the prompt. `top` holds the
  best candidates for each blank, by its name in the prompt; candidates for the whole output have the name ''. `tokens`
  are the ids of `output`.
  """

  prompt: str
  output: str
  text: str
  tokens: tuple[int, ...] = ()
  top: dict[str, tuple[Candidate, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Refused:
  """A prompt that cannot be answered, and why."""

  prompt: str
  error: UserError | DataError


def show_generated(
  opened: Callable[[], Readable], prompts: Sequence[str], max_tokens: int = 64, top: int | None = None,
  how: Decoding = GREEDY,
  *, mesh: MeshConfig = ONE_DEVICE, places: Sequence[str] = (), out: pathlib.Path | None = None,
  special: Sequence[str] = (),
) -> int:  # fmt: skip
  """Prints each answer, or writes all of them to `out`, and prints a line on stderr for each refused prompt.

  Returns 0, or the exit code of the first refused prompt. Characters that the encoding of stdout lacks are escaped.
  """
  code, encoding, records = 0, sys.stdout.encoding or 'utf-8', []
  counter = Counter(len(prompts), 'prompts') if places or how.batch > 1 else None
  found = answers(opened, prompts, max_tokens, top, how, mesh=mesh, places=places, counter=counter, special=special)
  for result in found:
    records.append(record(result))
    if isinstance(result, Refused):
      code = code or result.error.exit_code
      print(redact(str(result.error)), file=sys.stderr)
    elif out is None:
      print('\n'.join(_lines(result)).encode(encoding, 'backslashreplace').decode(encoding), end='\n\n', flush=True)
  if out is not None:
    write_jsonl(out, records)
    print(out)
  return code


def record(result: 'Generated | Refused') -> dict:
  """A line of the file of answers: a refused prompt has `error`, an answered one `output`, `text` and `tokens`."""
  if isinstance(result, Refused):
    return {'prompt': result.prompt, 'error': redact(str(result.error))}
  found = {'prompt': result.prompt, 'output': result.output, 'text': result.text, 'tokens': list(result.tokens)}
  top = {name: [dataclasses.asdict(c) for c in candidates] for name, candidates in result.top.items()}
  return found | ({'top': top} if top else {})


def write_jsonl(path: pathlib.Path, records: Sequence[dict]) -> None:
  """Writes all records, or leaves the file as it was."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + '.tmp')
  lines = (json.dumps(each, ensure_ascii=False) + '\n' for each in records)
  temporary.write_text(''.join(lines), encoding='utf-8', errors='backslashreplace')
  temporary.replace(path)


def _lines(result: Generated) -> Iterator[str]:
  yield from (f'prompt  {result.prompt}', f'output  {result.output}')
  for name, candidates in result.top.items():
    yield f'top     {name or "of the output"}'
    yield from (f'{c.probability:>14.2%}  {c.text or "(nothing)"}{"" if c.ended else " …"}' for c in candidates)
  yield f'text    {result.text}'


def generate(
  workdir: Folder,
  prompts: Sequence[str],
  max_tokens: int = 64,
  top: int | None = None,
  how: Decoding = GREEDY,
) -> list[Generated | Refused]:
  """All of `answers` by the newest step of a run."""
  return list(answers(lambda: open_run(workdir), prompts, max_tokens, top, how))


def answers(
  opened: Callable[[], Readable], prompts: Sequence[str], max_tokens: int = 64, top: int | None = None,
  how: Decoding = GREEDY,
  *, mesh: MeshConfig = ONE_DEVICE, places: Sequence[str] = (), counter: Counter | None = None,
  special: Sequence[str] = (),
) -> Iterator[Generated | Refused]:  # fmt: skip
  """The answer to each prompt in turn: at most `max_tokens` tokens, and no more than rows of training held. `opened()`
  opens the model, once the prompts are known to be text.

  Prompts are read as the run's objective reads its inputs (`prompt_inputs`). Outputs are those of `how`, by default
  greedy; with `top` they are the best of an exact beam search, and come with the `top` best candidates. The names of
  special tokens in `special` are tokens in prompts, and text otherwise (`prompts.reading_special`). Raises the errors
  of `opened`, e.g. of `open_run`. A prompt longer than the rows of training, one that the objective cannot answer, and
  one with a sentinel that does not exist are `Refused`, with their `places` (default: `--text=`); the others are
  answered. All of them are checked before a parameter is read.
  """
  _check_counts(max_tokens, top)
  check_decoding(how)
  if top is not None and how != GREEDY:
    raise ConfigError(
      '--top lists the most likely outputs, one prompt at a time; leave out the other flags of decoding.'
    )
  places = places or ['--text='] * len(prompts)
  if not any(map(is_text, prompts)):  # nothing can be answered, whatever the run is
    return iter([Refused(prompt, not_utf8(prompt)) for prompt in prompts])
  run = opened()
  data = reading_special(run.data, special)
  inputs = [_read_prompt(prompt, place, run.cfg, data) for prompt, place in zip(prompts, places, strict=True)]
  if all(isinstance(own, Refused) for own in inputs):
    return (own for own in inputs if isinstance(own, Refused))
  return _answers(run.writer(mesh), prompts, inputs, max_tokens, top, how, counter)


def _check_counts(max_tokens: int, top: int | None) -> None:
  if max_tokens < 1:
    raise ConfigError(f'--max_tokens={max_tokens}; it must be at least 1.')
  if top is not None and not 1 <= top <= MOST_TOP:
    raise ConfigError(f'--top={top}; it must be from 1 to {MOST_TOP}.')


def _read_prompt(prompt: str, place: str, cfg: Experiment, data: DataSource) -> list[int] | Refused:
  try:
    check_special(prompt, data)
    inputs = prompt_inputs(prompt, cfg, data, place)
    _check_ids(inputs, cfg.model.vocab_size)
    room_for(prompt, inputs, cfg, place)
  except DataError as error:
    return Refused(prompt, DataError(f'{error.message} ({named(prompt, place)})', error.code))
  except UserError as error:
    return Refused(prompt, error)
  return inputs


def _check_ids(inputs: list[int], vocab_size: int) -> None:
  """Raises DataError for a special token that the model has no row for: imported vocabularies may end at the pieces."""
  if beyond := [token for token in inputs if token >= vocab_size]:
    raise DataError(
      f'a special token of the prompt has id {beyond[0]}, and model.vocab_size={vocab_size}; leave it out.'
    )


def _answers(
  writer: Writer, prompts: Sequence[str], inputs: Sequence[list[int] | Refused], max_tokens: int, top: int | None,
  how: Decoding, counter: Counter | None,
) -> Iterator[Generated | Refused]:  # fmt: skip
  """Answers in the order of the prompts, each as soon as it and those before it are known."""
  rooms = {
    number: min(max_tokens, room_for(prompts[number], own, writer.cfg))
    for number, own in enumerate(inputs) if not isinstance(own, Refused)
  }  # fmt: skip
  if top is None:
    found = _decoded(writer, prompts, {number: inputs[number] for number in rooms}, rooms, how)
  else:
    found = ((number, _best(writer, prompts[number], inputs[number], rooms[number], top)) for number in rooms)
  ready: dict[int, Generated | Refused] = {n: own for n, own in enumerate(inputs) if isinstance(own, Refused)}
  for number in range(len(prompts)):
    while number not in ready:
      done, result = next(found)
      ready[done] = result
      if counter is not None:
        counter.show(len(ready))
    yield ready[number]
  if counter is not None:
    counter.close()


def _decoded(writer: Writer, prompts, inputs: dict[int, list[int]], rooms: dict[int, int], how: Decoding):
  numbers = list(inputs)
  for i, output in outputs(writer, list(inputs.values()), list(rooms.values()), how, numbers):
    number = numbers[i]
    yield number, _result(prompts[number], inputs[number], output, writer.cfg, writer.data)


def _best(writer: Writer, prompt: str, inputs: list[int], room: int, top: int) -> Generated:
  output, found = best_outputs(writer, prompt, inputs, room, top)
  return dataclasses.replace(_result(prompt, inputs, output, writer.cfg, writer.data), top=found)


def _result(prompt: str, inputs: list[int], output: list[int], cfg: Experiment, data: DataSource) -> Generated:
  written = data.tokenizer.render(output)
  text = written if answers_whole(cfg) else filled(prompt, inputs, output, data.tokenizer)
  return Generated(prompt, written, text, tuple(output))
