"""Names of settings in T5X, t5 and MaxText -> the key here, for the message about a name that is none of ours."""

# Macros of T5X's and t5's gin files, and settings of MaxText in capitals.
KEYS = {
  'TRAIN_STEPS': 'train.steps',
  'TOTAL_STEPS': 'train.steps',
  'STEPS': 'train.steps',
  'NUM_TRAIN_STEPS': 'train.steps',
  'BATCH_SIZE': 'data.batch_size',
  'TRAIN_BATCH_SIZE': 'data.batch_size',
  'GLOBAL_BATCH_SIZE': 'data.batch_size',
  'PER_DEVICE_BATCH_SIZE': 'data.batch_size',
  'EVAL_STEPS': 'evaluation.batches',
  'EVAL_PERIOD': 'evaluation.every',
  'EVAL_INTERVAL': 'evaluation.every',
  'EVALUATOR_NUM_EXAMPLES': 'evaluation.batches',
  'JSON_WRITE_N_RESULTS': 'evaluation.generate',
  'CHECKPOINT_PERIOD': 'checkpoint.every',
  'SAVING_PERIOD': 'checkpoint.every',
  'LOG_PERIOD': 'train.log_every',
  'NUM_MICROBATCHES': 'train.accumulate',
  'MICROBATCHES': 'train.accumulate',
  'GRADIENT_ACCUMULATION_STEPS': 'train.accumulate',
  'NUM_MODEL_PARTITIONS': 'mesh.tensor',
  'NUM_PARTITIONS': 'mesh.tensor',
  'MODEL_PARALLEL_SUBMESH': 'mesh.tensor',
  'TASK_FEATURE_LENGTHS': 'data.inputs_length and data.targets_length',
  'FEATURE_LENGTHS': 'data.inputs_length and data.targets_length',
  'SEQUENCE_LENGTH': 'data.inputs_length and data.targets_length',
  'INPUTS_LENGTH': 'data.inputs_length',
  'TARGETS_LENGTH': 'data.targets_length',
  'MAX_TARGET_LENGTH': 'data.targets_length',
  'MAX_SEQUENCE_LENGTH': 'data.targets_length',
  'MIXTURE_OR_TASK_NAME': 'data.sources',
  'MIXTURE_OR_TASK_MODULE': 'data.sources',
  'MIXTURE_NAME': 'data.sources',
  'TASK_NAME': 'data.sources',
  'TASK': 'data.sources',
  'DATASET_PATH': 'data.sources',
  'DATASET_NAME': 'data.sources',
  'DROPOUT_RATE': 'model.dropout',
  'DROPOUT': 'model.dropout',
  'LABEL_SMOOTHING': 'loss.label_smoothing',
  'Z_LOSS': 'loss.z_loss',
  'LEARNING_RATE': 'schedule.peak',
  'BASE_LEARNING_RATE': 'schedule.peak',
  'WARMUP_STEPS': 'schedule.warmup_steps',
  'OPTIMIZER': 'optimizer.name',
  'OPT_TYPE': 'optimizer.name',
  'WEIGHT_DECAY': 'optimizer.weight_decay',
  'VOCAB_SIZE': 'model.vocab_size',
  'EMBED_DIM': 'model.embed',
  'EMB_DIM': 'model.embed',
  'BASE_EMB_DIM': 'model.embed',
  'NUM_HEADS': 'model.heads',
  'BASE_NUM_QUERY_HEADS': 'model.heads',
  'BASE_NUM_KV_HEADS': 'model.kv_heads',
  'HEAD_DIM': 'model.head_dim',
  'MLP_DIM': 'model.mlp.hidden',
  'BASE_MLP_DIM': 'model.mlp.hidden',
  'NUM_LAYERS': 'model.layers',
  'BASE_NUM_DECODER_LAYERS': 'model.layers',
  'NUM_ENCODER_LAYERS': 'model.encoder_layers',
  'NUM_DECODER_LAYERS': 'model.decoder_layers',
  'REMAT_POLICY': 'model.remat',
  'INITIAL_CHECKPOINT_PATH': 'checkpoint.initial',
  'PRETRAINED_MODEL_PATH': 'checkpoint.initial',
  'LOAD_PARAMETERS_PATH': 'checkpoint.initial',
  'RANDOM_SEED': 'seed',
  'MIXTURE_SEED': 'seed',
  'SEED': 'seed',
}  # fmt: skip
# What is no key: what to do.
OTHERWISE = {
  'MODEL_DIR': 'the flag is --workdir',
  'BASE_OUTPUT_DIRECTORY': 'the flag is --workdir',
  'RUN_NAME': 'the flag is --workdir',
  'USE_CACHED_TASKS': 'remove it: data is always prepared ahead, by pretrain data prepare',
  'SHUFFLE_TRAIN_EXAMPLES': 'remove it: rows are always shuffled, by seed',
  'LOSS_NORMALIZING_FACTOR': 'remove it: the loss of a step is the mean over its target tokens',
  'VOCABULARY': 'remove it: each store of data.sources has its tokenizer',
}


def instead_of(name: str) -> str | None:
  """What to write here for a macro or key of another stack; None for a name that is not known.

  >>> instead_of('TRAIN_STEPS'), instead_of('base_emb_dim'), instead_of('WIDHT')
  ('write train.steps = …', 'write model.embed = …', None)
  """
  if key := KEYS.get(name.upper()):
    return f'write {key} = …'.replace(' and', ' = … and')
  return OTHERWISE.get(name.upper())
