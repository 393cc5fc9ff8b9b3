"""Write the lines of Python that load a saved model and generate with it."""

from dataclasses import dataclass

PLACEHOLDER = "path/to/this/folder"


@dataclass(frozen=True)
class Usage:
    """How a saved model is used.

    Attributes:
        name: of the saved model, a repository or a folder.
        adapter_of: the base model of a saved adapter; None for a whole model.
        chat: whether its prompts are conversations, rendered by the chat template.
        own_code: whether the model comes with code.
    """

    name: str
    adapter_of: str | None
    chat: bool
    own_code: bool = False

    def lines(self) -> list[str]:
        """Return the program."""
        trust = ", trust_remote_code=True" if self.own_code else ""
        return [
            *(["from peft import PeftModel"] if self.adapter_of else []),
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"name = {self.name!r}",
            *([f"base = {self.adapter_of!r}"] if self.adapter_of else []),
            f"tokenizer = AutoTokenizer.from_pretrained(name{trust})",
            *self._model(trust),
            *self._inputs(),
            "output = model.generate(**inputs, max_new_tokens=200)",
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]

    def _model(self, trust: str) -> list[str]:
        first = "base" if self.adapter_of else "name"
        lines = [f'model = AutoModelForCausalLM.from_pretrained({first}, dtype="auto"{trust})']
        return [*lines, "model = PeftModel.from_pretrained(model, name)"] if self.adapter_of else lines

    def _inputs(self) -> list[str]:
        if not self.chat:
            return ['inputs = tokenizer("The prompt, as plain text", return_tensors="pt")']
        return [
            'messages = [{"role": "user", "content": "The question"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]
