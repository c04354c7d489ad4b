"""The pocket's tokenizer and processor: a small byte-level BPE, and Idefics3's own processor set to 64 pixels.

Bytes are the alphabet, so any text can be encoded; digits never merge with each other. A turn is framed by
`<user>` or `<assistant>` before it and `<end_of_utterance>` after it.
"""

from __future__ import annotations

from random import Random

VOCABULARY = 1000
PAD, USER, ASSISTANT, END = "<pad>", "<user>", "<assistant>", "<end_of_utterance>"
FAKE, GLOBAL, IMAGE = "<fake_token_around_image>", "<global-img>", "<image>"
SPECIAL = (PAD, USER, ASSISTANT, END, FAKE, GLOBAL, IMAGE)
DELIMITERS = (".", ",", ":", "\n")
IMAGE_TOKENS = 16

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<assistant>' if message['role'] == 'assistant' else '<user>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<end_of_utterance>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)

# Everyday English, so that words outside the pocket world are not split into bytes.
_EVERYDAY = """
the be to of and a in that have it for not on with he as you do at this but his by from they we say her she or an
will my one all would there their what so up out if about who get which go me when make can like time no just him
know take people into year your good some could them see other than then now look only come its over think also
back after use two how our work first well way even new want because any these give day most us is are was were
has had been does did image picture photo object objects person man woman child dog cat bird car bus train house
street tree water food table chair book phone left right above below behind front near far big small large little
many much few number count how where why yes please explain describe answer question next last long short high low
old young hot cold white black red green blue yellow brown gray pink purple orange color colour shape size side top
bottom middle inside outside same different more less most least between under around during before through
"""
COMMON_WORDS = _EVERYDAY.split()


def corpus(conversations: int = 3000, seed: int = 0) -> list[str]:
    """The tokenizer's training texts: turns of the pocket's conversations and everyday words."""
    from pocket_base.conversations import sample_training_conversation

    rng = Random(seed)
    texts = []
    for _ in range(conversations):
        for turn in sample_training_conversation(rng, early=rng.random() < 0.3).turns:
            texts += [turn.question.text, turn.question.reply]
    words = COMMON_WORDS * 20
    rng.shuffle(words)
    return texts + [" ".join(words[i : i + 12]) for i in range(0, len(words), 12)]


def train_tokenizer(texts: list[str]):
    """A `PreTrainedTokenizerFast` of `VOCABULARY` entries."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r"\n| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_processor(texts: list[str]):
    """Idefics3's processor: one 64x64 view of each image (no tiles), 16 visual tokens, the pocket's chat format."""
    from transformers import Idefics3ImageProcessor, Idefics3Processor

    side = {"longest_edge": 64}
    image_processor = Idefics3ImageProcessor(
        size=side,
        max_image_size=side,
        do_image_splitting=False,
        image_mean=[0.5, 0.5, 0.5],  # no pixel value becomes exactly 0, so no real image counts as padding
        image_std=[0.5, 0.5, 0.5],
    )
    return Idefics3Processor(
        image_processor, train_tokenizer(texts), image_seq_len=IMAGE_TOKENS, chat_template=CHAT_TEMPLATE
    )
