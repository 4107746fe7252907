"""Make the outputs of an executed notebook fit to be kept.

Widget states, paths of the run and lines that say that a process is at work go; figures take fewer bytes.
"""

import base64
import io
import re
import sys
from pathlib import Path

from nbformat import NotebookNode
from PIL import Image, ImageChops  # matplotlib needs it, too

INVISIBLE = 16  # of 255, in a channel of a pixel
PNG = "image/png"
AT_WORK = re.compile(r"^(.*: )?\.\.\. (.* )?at work for \d+ s\n", re.MULTILINE)  # of use while a cell runs
_TEXTS = {"text", "text/plain", "text/markdown"}
_WIDGETS = ("application/vnd.jupyter.widget-view+json", "application/vnd.jupyter.widget-state+json")


def clean(node: NotebookNode, folder: Path) -> None:
    """Clean all outputs in place.

    Args:
        node: An executed notebook.
        folder: Where it ran. Outputs get `.` for it, since where it lay tells nothing.
    """
    node.metadata.pop("widgets", None)
    for cell in node.cells:
        if cell.get("outputs"):
            cell.outputs = _joined(cell.outputs)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            for kind in _WIDGETS:
                data.pop(kind, None)
            if PNG in data:
                data[PNG] = smaller(data[PNG])
            for holder in (output, data):
                for kind in _TEXTS & holder.keys():
                    holder[kind] = _without(folder, holder[kind])
            if output.get("name") == "stderr":  # a warning names the file that it comes from
                output.text = output.text.replace(f"{sys.prefix}/", "")


def smaller(encoded: str) -> str:
    """A PNG in base64 in fewer bytes, with the same look.

    Without an alpha channel that hides nothing, and with 256 colours where no pixel changes by more than `INVISIBLE` in
    any channel: anti-aliased edges have thousands, which nobody tells apart.
    """
    image = Image.open(io.BytesIO(base64.b64decode(encoded)))
    if image.mode == "RGBA" and image.getextrema()[-1] == (255, 255):
        image = image.convert("RGB")
    if image.mode == "RGB":
        fewer = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        changed = ImageChops.difference(image, fewer.convert("RGB")).getextrema()
        image = fewer if max(most for _, most in changed) <= INVISIBLE else image
    packed = io.BytesIO()
    image.save(packed, "PNG", optimize=True)
    found = base64.b64encode(packed.getvalue()).decode()
    return min(found, encoded.replace("\n", ""), key=len)


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Neighbouring outputs of one stream as one, without the lines `AT_WORK`."""
    joined: list[NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream":
            output.text = AT_WORK.sub("", output.text)
            if not output.text:
                continue
            if joined and joined[-1].get("name") == output.name:
                joined[-1].text += output.text
                continue
        joined.append(output)
    return joined


def _without(folder: Path, shown: str) -> str:
    """`shown` with `folder` written as `.`, also where a compiler's message has cut off the beginning of the path."""
    ending = re.escape("/".join(folder.parts[-2:]))
    return re.sub(rf"[^\s\"'`(]*{ending}(?=/)", ".", shown).replace(str(folder), ".")
