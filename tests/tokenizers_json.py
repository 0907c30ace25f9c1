"""Small tokenizers of `tokenizers`, trained on the license, as published models have them."""

import functools
import json
import pathlib

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.conftest import paragraphs

SPECIAL = {
  'byte_level': ('<|endoftext|>', '<|im_end|>'),
  'byte_fallback': ('<unk>', '<s>', '</s>'),
  'wordpiece': ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]'),
}


@functools.cache
def content(kind: str) -> bytes:
  """tokenizer.json: 'byte_level' as GPT-2's and Qwen's, 'byte_fallback' as Llama's, 'unigram' as T5's, 'wordpiece' as
  BERT's."""
  makers = {'byte_level': _byte_level, 'byte_fallback': _byte_fallback, 'unigram': _unigram, 'wordpiece': _wordpiece}
  return makers[kind]().to_str().encode()


def _byte_level() -> Tokenizer:
  """The special tokens follow the pieces, as Qwen's: <|endoftext|> is 400, <|im_end|> 401."""
  found = Tokenizer(models.BPE())
  found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  found.decoder = decoders.ByteLevel()
  found.post_processor = processors.ByteLevel(trim_offsets=False)
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
  found.train_from_iterator([*paragraphs(), *["it's"] * 200], trainer)  # 's becomes a piece
  found.add_special_tokens(list(SPECIAL['byte_level']))
  return found


def _byte_fallback() -> Tokenizer:
  """Unknown 0, <s> 1, </s> 2, which its post-processor does not add at the end."""
  bytes_of = [f'<0x{byte:02X}>' for byte in range(256)]
  found = Tokenizer(models.BPE(unk_token='<unk>', byte_fallback=True, fuse_unk=True))
  found.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
  found.decoder = decoders.Sequence(
    [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)]
  )
  found.pre_tokenizer = pre_tokenizers.Split('▁', 'merged_with_next')  # of the trainer alone: spaces begin pieces
  trainer = trainers.BpeTrainer(
    vocab_size=480, special_tokens=[*SPECIAL['byte_fallback'], *bytes_of], show_progress=False, max_token_length=12
  )
  found.train_from_iterator(paragraphs(), trainer)
  values = json.loads(found.to_str())
  values['added_tokens'] = values['added_tokens'][:3]  # bytes are pieces, not special tokens
  values['pre_tokenizer'] = None
  found = Tokenizer.from_str(json.dumps(values))
  found.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
  return found


def _wordpiece() -> Tokenizer:
  """[PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4."""
  found = Tokenizer(models.WordPiece(unk_token='[UNK]'))
  found.normalizer, found.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
  found.decoder = decoders.WordPiece()
  trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=[*SPECIAL['wordpiece']], show_progress=False)
  found.train_from_iterator(paragraphs(), trainer)
  found.post_processor = processors.TemplateProcessing(
    single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)]
  )
  return found


def _unigram() -> Tokenizer:
  """T5's: padding 0, </s> 1, <unk> 2, and four sentinels at the end, <extra_id_0> the last."""
  found = Tokenizer(models.Unigram())
  found.pre_tokenizer, found.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
  trainer = trainers.UnigramTrainer(
    vocab_size=300, special_tokens=['<pad>', '</s>', '<unk>'], unk_token='<unk>', show_progress=False
  )
  found.train_from_iterator(paragraphs(), trainer)
  found.add_special_tokens([f'<extra_id_{k}>' for k in (3, 2, 1, 0)])
  found.post_processor = processors.TemplateProcessing(single='$A </s>', special_tokens=[('</s>', 1)])
  return found


def publish(folder: pathlib.Path, kind: str, **files) -> pathlib.Path:
  """`folder` with a tokenizer.json and, beside it, JSON files: `config={…}` is config.json."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'tokenizer.json').write_bytes(content(kind))
  for name, values in files.items():
    (folder / f'{name}.json').write_text(json.dumps(values))
  return folder
