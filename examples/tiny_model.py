"""Train a chat model of 0.4 million weights from scratch in well under a minute on a CPU.

It learns the facts of `quiz.py` and both ways to reply, about equally often: a model that knows the
answers, but not which behaviour people want. It has all parts of a real checkpoint: tokenizer, chat
template, safetensors.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from quiz import Question, courteous_replies, curt_replies
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

PAD, END, UNKNOWN = "<|pad|>", "<|end|>", "<|unknown|>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
COURTEOUS_SHARE = 0.54  # of the lessons: thumbs up to down then lie between 1:1 and 4:3, as KTO wants them
IGNORED = -100  # the label that torch's cross entropy ignores


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a tokenizer with a token for each word of `texts`, a chat template, and end, padding and unknown tokens."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, END, UNKNOWN, USER, ASSISTANT]
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Create a Llama of two layers with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,  # the longest row that --max-length allows
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def user_turn(question: Question) -> list[dict[str, str]]:
    """Return the conversation up to the reply."""
    return [{"role": "user", "content": question.text}]


def assistant_turn(reply: str) -> list[dict[str, str]]:
    """Return the reply as a conversation's continuation."""
    return [{"role": "assistant", "content": reply}]


def build_base_model(
    questions: Sequence[Question], path: Path, *, seed: int, steps: int = 350, batch_size: int = 32
) -> Iterator[tuple[int, float]]:
    """Train a new model on both ways to reply to `questions` and save it at `path`; yield (step, loss in nats)."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    replies = [reply for question in questions for reply in courteous_replies(question) + curt_replies(question)]
    tokenizer = train_tokenizer([question.text for question in questions] + replies)
    model = make_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    for step in range(1, steps + 1):
        loss = model(**teaching_batch(rng.sample(questions, batch_size), tokenizer, rng)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        yield step, loss.item()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def teaching_batch(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> dict[str, torch.Tensor]:
    """Build a batch of questions with a random courteous or curt reply each; loss on the reply only. Shapes (B, T)."""
    rows = []
    for question in questions:
        manner = courteous_replies if rng.random() < COURTEOUS_SHARE else curt_replies
        conversation = user_turn(question) + assistant_turn(rng.choice(manner(question)))
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
        rows.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    width = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), IGNORED)
    assistant = tokenizer.convert_tokens_to_ids(ASSISTANT)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row)
        start = row.index(assistant) + 1
        labels[i, start : len(row)] = torch.tensor(row[start:])
    # Padding is on the right, where causal attention does not reach: no mask is needed.
    return {"input_ids": input_ids, "labels": labels}


def load(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a saved model and its tokenizer with Transformers."""
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


@torch.inference_mode()
def sample_replies(path: Path, questions: Sequence[Question], *, seed: int, batch_size: int = 256) -> list[str]:
    """Sample one reply to each question from the model's own distribution: temperature 1, no truncation."""
    model, tokenizer = load(path)
    model.eval()
    torch.manual_seed(seed)
    replies: list[str] = []
    for start in range(0, len(questions), batch_size):
        prompts = [user_turn(question) for question in questions[start : start + batch_size]]
        inputs = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=48)
        new_tokens = output[:, inputs["input_ids"].shape[1] :]  # (B, T_new)
        replies += tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
    return replies
