"""Ask an OpenAI-compatible server about a picture.

python examples/ask.py http://localhost:8000/v1 photo.jpg "What is on the sign?"

A server that asks for a key gets that in OPENAI_API_KEY.
"""

import argparse
import base64
import mimetypes
import os
import sys
from pathlib import Path

import openai


def main() -> None:
    """Send one image with one question and write the answer as it comes; one line and status 1 where that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_url")
    parser.add_argument("image", type=Path)
    parser.add_argument("question")
    options = parser.parse_args()
    kind = mimetypes.guess_type(options.image.name)[0] or "image/png"
    try:
        url = f"data:{kind};base64,{base64.b64encode(options.image.read_bytes()).decode()}"
    except OSError as error:
        sys.exit(f"error: {options.image} cannot be read ({error.strerror})")
    try:
        ask(options.base_url, url, options.question)
    except openai.APIConnectionError:
        sys.exit(f"error: no server answers at {options.base_url}")
    except openai.APIError as error:
        sys.exit(f"error: {options.base_url} refuses the request ({' '.join(error.message.split())})")


def ask(base_url: str, image_url: str, question: str) -> None:
    """Write the answer of the server's first model to stdout, piece by piece."""
    content = [{"type": "image_url", "image_url": {"url": image_url}}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    client = openai.OpenAI(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY") or "none")
    served = client.models.list().data
    if not served:
        sys.exit(f"error: {base_url} serves no model")
    for chunk in client.chat.completions.create(model=served[0].id, messages=messages, temperature=0, stream=True):
        sys.stdout.write(chunk.choices[0].delta.content or "")
        sys.stdout.flush()
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
