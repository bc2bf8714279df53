"""A model made by hand that gives one answer to everything: what a harness must count is then known."""

from pathlib import Path
from typing import Any

import torch


@torch.no_grad()
def save_one_word_model(model: Any, processor: Any, word: str, folder: Path) -> Path:
    """Makes a tiny model say `word` after every prompt, and saves it with its processor.

    No layer adds anything to what it reads, so the last hidden state depends on the last token alone. The head then
    names, for the token that opens an answer and for each token of the word, the one that comes next.
    """
    for name, parameter in model.named_parameters():
        if name.split(".")[-2] in ("o_proj", "out_proj", "down_proj", "fc2"):
            parameter.zero_()
    tokenizer = processor.tokenizer
    opening = tokenizer(processor.apply_chat_template([{"role": "user", "content": ""}], add_generation_prompt=True))
    word_ids = tokenizer(word)["input_ids"]
    chain = [opening["input_ids"][-1], *word_ids, tokenizer.eos_token_id]
    states = model.eval().model(input_ids=torch.tensor([chain])).last_hidden_state[0]
    head = model.get_output_embeddings()
    head.weight.zero_()
    for state, following in zip(states, chain[1:], strict=False):
        head.weight[following] += 50 * torch.nn.functional.normalize(state, dim=0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
