"""Load a model directory with plain transformers (secateur can't be imported here) and continue a prompt.

python benchmarks/generate.py demo/smollm2-80 "The capital of France is"
"""

import sys

sys.modules["secateur"] = None  # type: ignore[assignment]  # any import of it fails from here on

from transformers import AutoModelForCausalLM, AutoTokenizer


def main(directory: str, prompt: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
