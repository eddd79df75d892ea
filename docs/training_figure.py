"""Draw `images/losses.svg` from the log of a run: `python docs/training_figure.py [LOG]`.

The losses of `pipelines/train_sft.yaml` on the demo's data, by what a document is made of. With LOG, they are first taken from
that `log.jsonl` and kept beside the picture.
"""

import json
import sys
from pathlib import Path

from omniprep.train.progress_log import read_log

IMAGES = Path(__file__).parent / "images"
OUT, KEPT = IMAGES / "losses.svg", IMAGES / "losses.json"
PREFIX = "loss/modality/"
COLOURS = {"text": "#5b7db1", "audio": "#d08a3e", "image": "#6a9a58", "video": "#9a6bb0", "audio+video": "#b0575b"}
LEFT, TOP, WIDTH, HEIGHT = 46, 14, 620, 250
SMALL = 'font-size="11" fill="#666"'

Curves = dict[str, list[tuple[int, float]]]


def curves_of(log: Path) -> Curves:
    """Return (step, loss) of every modality; a line of the log has those that its steps had."""
    curves: Curves = {}
    for line in read_log(log, kind="step"):
        for name, value in line.items():
            if name.startswith(PREFIX):
                curves.setdefault(name.removeprefix(PREFIX), []).append((line["step"], round(value, 3)))
    return curves


def figure() -> str:
    """Return the picture of the kept losses."""
    curves: Curves = json.loads(KEPT.read_text(encoding="utf-8"))
    points = [point for curve in curves.values() for point in curve]
    last = max(step for step, _ in points)
    low, high = int(min(loss for _, loss in points)), int(max(loss for _, loss in points)) + 1

    def x(step: int) -> float:
        return LEFT + WIDTH * step / last

    def y(loss: float) -> float:
        return TOP + HEIGHT * (high - loss) / (high - low)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 110} {TOP + HEIGHT + 36}" '
        'font-family="sans-serif">'
    ]
    for loss in range(low, high + 1):
        out.append(f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y(loss):.1f}" y2="{y(loss):.1f}" stroke="#ddd"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y(loss) + 4:.1f}" text-anchor="end" {SMALL}>{loss}</text>')
    for step in range(0, last + 1, 5):
        out.append(f'<text x="{x(step):.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle" {SMALL}>{step}</text>')
    out.append(f'<text x="{LEFT + WIDTH / 2}" y="{TOP + HEIGHT + 32}" text-anchor="middle" {SMALL}>step</text>')
    for number, (name, curve) in enumerate(sorted(curves.items(), key=lambda item: list(COLOURS).index(item[0]))):
        path = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in curve)
        out.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[name]}" stroke-width="1.6"/>')
        out += [f'<circle cx="{x(step):.1f}" cy="{y(loss):.1f}" r="2.4" fill="{COLOURS[name]}"/>' for step, loss in curve]
        top = TOP + 12 + 18 * number
        out.append(f'<rect x="{LEFT + WIDTH + 16}" y="{top - 9}" width="10" height="10" fill="{COLOURS[name]}"/>')
        out.append(f'<text x="{LEFT + WIDTH + 32}" y="{top}" {SMALL}>{name}</text>')
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        KEPT.write_text(json.dumps(curves_of(Path(sys.argv[1]))) + "\n", encoding="utf-8")
    OUT.write_text(figure(), encoding="utf-8")
