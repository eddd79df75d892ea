"""Draw `images/rope_modes.svg` from positions that `lay_out` computes: `python docs/rope_figure.py`.

The example is one on which the modes differ: 12 s of video of which every 0.75 s a frame was kept (a frame cap), with
sound that starts 0.4 s after the picture.
"""

from pathlib import Path

import numpy as np

from omniprep.profile import QWEN2_5_OMNI as PROFILE
from omniprep.tokens.layout import TrackRun, VideoRun, lay_out
from omniprep.types import RopeMode

OUT = Path(__file__).parent / "images" / "rope_modes.svg"
GRID_S = 1.5
NUM_GRIDS = 8
AUDIO_START_S = 0.4
NUM_AUDIO_TOKENS = 290
LEFT, WIDTH, LANE, PANEL = 150, 780, 34, 190
SMALL = 'font-size="11" fill="#666"'
VIDEO_COLOUR, AUDIO_COLOUR, TEXT_COLOUR = "#5b7db1", "#d08a3e", "#6a9a58"


def block_ids(mode: RopeMode) -> tuple[list[int], list[int], int]:
    """Return the temporal ids of the grid steps, of the audio tokens, and of the text that follows, from the block's start."""
    video = VideoRun(
        grid_thw=(NUM_GRIDS, 4, 4),
        grid_times_s=tuple(GRID_S * step for step in range(NUM_GRIDS)),
        second_per_grid=PROFILE.temporal_patch_size / PROFILE.video_fps,
        item=0,
        track=TrackRun(num_tokens=NUM_AUDIO_TOKENS, start_s=AUDIO_START_S, item=0),
    )
    layout = lay_out([video, ([7], True)], rope_mode=mode)
    times = layout.position_ids[0]
    base = int(times[1]) + 1  # the two opening tokens share an id
    video_ids = np.unique(times[layout.input_ids == PROFILE.special.video]) - base
    audio_ids = times[layout.input_ids == PROFILE.special.audio] - base
    return video_ids.tolist(), audio_ids.tolist(), int(times[-1]) - base


def x_of(position: float) -> float:
    """Return where an id is drawn, in pixels."""
    return LEFT + WIDTH * position / 310


def panel(top: int, mode: RopeMode, note: str) -> list[str]:
    """Return the SVG elements of one mode."""
    video, audio, text = block_ids(mode)
    lanes = {"picture": top + 48, "sound": top + 48 + 2 * LANE}
    out = [
        f'<text x="16" y="{top + 20}" font-weight="bold">rope_mode: {mode}</text>',
        f'<text x="{LEFT + 60}" y="{top + 20}">{note}</text>',
    ]
    per_chunk = PROFILE.position_ids_per_chunk
    for chunk in range(7):
        left, right = x_of(chunk * per_chunk), min(x_of((chunk + 1) * per_chunk), LEFT + WIDTH)
        if chunk % 2 == 0:
            out.append(f'<rect x="{left:.1f}" y="{top + 36}" width="{right - left:.1f}" height="{4 * LANE - 8}" fill="#eee"/>')
        out.append(f'<text x="{left + 2:.1f}" y="{top + 4 * LANE + 42}" {SMALL}>{chunk * per_chunk}</text>')
    for name, y in lanes.items():
        out.append(f'<text x="16" y="{y + 17}">{name}</text>')
    for step, position in enumerate(video):
        middle = x_of(position)
        heard = round((GRID_S * step - AUDIO_START_S) * PROFILE.position_id_per_second)
        if 0 <= heard < len(audio):
            ends = f'y1="{lanes["picture"] + 24}" x2="{x_of(audio[heard]):.1f}" y2="{lanes["sound"]}"'
            out.append(f'<line x1="{middle:.1f}" {ends} stroke="#777" stroke-dasharray="3 2"/>')
        out.append(f'<rect x="{middle - 9:.1f}" y="{lanes["picture"]}" width="18" height="24" rx="3" fill="{VIDEO_COLOUR}"/>')
        out.append(f'<text x="{middle:.1f}" y="{lanes["picture"] - 4}" {SMALL} text-anchor="middle">{GRID_S * step:g} s</text>')
    left, right = x_of(audio[0]), x_of(audio[-1] + 1)
    out.append(f'<rect x="{left:.1f}" y="{lanes["sound"]}" width="{right - left:.1f}" height="24" rx="3" fill="{AUDIO_COLOUR}"/>')
    label = f"sound from {AUDIO_START_S} s to {AUDIO_START_S + NUM_AUDIO_TOKENS / PROFILE.position_id_per_second:g} s"
    out.append(f'<text x="{left + 8:.1f}" y="{lanes["sound"] + 17}" fill="#fff" font-size="12">{label}</text>')
    out.append(f'<circle cx="{x_of(text):.1f}" cy="{lanes["sound"] + 12}" r="6" fill="{TEXT_COLOUR}"/>')
    out.append(f'<text x="{x_of(text):.1f}" y="{lanes["sound"] + 34}" {SMALL} text-anchor="middle">text {text}</text>')
    return out


def figure() -> str:
    """Return the figure as SVG."""
    note = "dashed: what is heard while a frame is seen; shaded: chunks of 2 s; below: temporal ids, from the block's start"
    rows = [
        *panel(0, "aligned", "an id is a true time: 25 a second, whatever was sampled"),
        *panel(PANEL + 20, "reference", "a grid step is taken for 1 s, and the sound for starting with the picture"),
        f'<text x="16" y="{2 * PANEL + 46}" {SMALL}>{note}</text>',
    ]
    size = f'viewBox="0 0 {LEFT + WIDTH + 40} {2 * PANEL + 60}"'
    background = f'<rect width="{LEFT + WIDTH + 40}" height="{2 * PANEL + 60}" fill="#fff"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13" fill="#333">{background}\n'
        + "\n".join(rows)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(figure(), encoding="utf-8")
