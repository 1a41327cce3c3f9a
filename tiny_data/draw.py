"""Training pictures without end: pages of text and patterns, each from its own seed.

    python tiny_data/draw.py --count 100 --seed 0 DIR              (--held-out)

Picture i of a seed is always the same one, whatever the count. Even pictures are
pages, odd ones patterns. Held-out pictures have their own seeds, words, fonts and
hues. Everything is drawn at twice its size and reduced, so edges are antialiased.
"""
import argparse
import colorsys
import os
import zlib

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

WORDS = """the of and to in is that it was for on are as with his they be at one have
this from or had by hot but some what there we can out other were all your when up use
word how said an each she which do their time if will way about many then them would
write like so these her long make thing see him two has look more day could go come did
my sound no most number who over know water than call first people may down side been
now find any new work part take get place made live where after back little only round
man year came show every good me give our under name very through just form much great
think say help low line before turn cause same mean differ move right boy old too does
tell sentence set three want air well also play small end put home read hand port large
spell add even land here must big high such follow act why ask men change went light
kind off need house picture try us again animal point mother world near build""".split()
HELD_OUT_WORDS = """orchard velvet quartz juniper harbour twelve magpie lantern fjord
oxide walnut zephyr bronze kettle puzzle vineyard maximum gravity sphinx thicket jacket
cobalt rhythm glacier pumpkin whisper yellow buffalo dwarf chimney equinox jigsaw
meadow nectar opal parsley quiver ribbon saddle tunnel umbrella violin wizard exhibit
yarrow zigzag acorn biscuit candle dolphin emerald feather giraffe hazel island jungle
kingdom lemon marble needle""".split()
HELD_OUT_FONTS = ("DejaVuSerif-BoldItalic", "DejaVuSans-BoldOblique")  # a serif, a sans
FONTS = """DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansMono
DejaVuSansMono-Bold DejaVuSansMono-Oblique DejaVuSerif DejaVuSerif-Bold
DejaVuSerif-Italic STIXGeneral STIXGeneralBol STIXGeneralItalic STIXGeneralBolIta
cmr10 cmb10 cmss10 cmtt10 cmti10""".split()


def font(name, pixels):
    """A font that ships with matplotlib, at twice the size (see page)."""
    path = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name + ".ttf")
    return ImageFont.truetype(path, round(2 * pixels))


def colour(rng, hue, saturation, value, held_out):
    """RGB in 0..1 from ranges. Of each sixth of the hues, training takes the first
    three quarters and held-out pictures take the last."""
    sector, part = divmod(rng.uniform(*hue) * 6, 1)
    part = 0.75 + 0.25 * part if held_out else 0.7 * part
    rgb = colorsys.hsv_to_rgb((sector + part) / 6 % 1, rng.uniform(*saturation),
                              rng.uniform(*value))
    return np.array(rgb, np.float32)


def size(rng):
    """(height, width), multiples of 32 from 320 to 448, already doubled."""
    return tuple(2 * 32 * rng.integers(10, 15, 2))


def picture(array):
    """An array of RGB in 0..1 at twice the size -> a picture."""
    array = (array.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return Image.fromarray(array).reduce(2)


def noise(rng, shape, cell, octaves=1):
    """Smooth noise of spread about 1; cell (y, x): its coarsest grain in pixels."""
    total = np.zeros(shape, np.float32)
    cell = np.broadcast_to(2.0 * np.asarray(cell, float), 2)
    for octave in range(octaves):
        height, width = shape / np.maximum(cell / 2 ** octave, 1)
        grid = rng.standard_normal((int(height) + 6, int(width) + 6)).astype(np.float32)
        left, top = rng.uniform(1, 3, 2)
        grain = Image.fromarray(grid).resize(
            shape[::-1], Image.BICUBIC, (left, top, left + width, top + height))
        total += np.asarray(grain) * 1.4 * 0.7 ** octave
    return total / np.sqrt(sum(0.49 ** octave for octave in range(octaves)))


def plane(rng, shape, degrees=5, warp=0.0, cell=30):
    """Coordinates x, y in (undoubled) pixels, turned a little and warped."""
    y, x = np.mgrid[:shape[0], :shape[1]].astype(np.float32) / 2
    angle = np.radians(rng.uniform(-degrees, degrees))
    x, y = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
    x += np.float32(rng.uniform(600, 700))
    y += np.float32(rng.uniform(600, 700))
    if warp:
        x = x + warp * noise(rng, shape, cell, 2)
        y = y + warp * noise(rng, shape, cell, 2)
    return x, y


def per_cell(rng, column, row, count):
    """Random numbers of spread 1 that belong to a cell of a pattern."""
    table = rng.standard_normal((64, 64, count)).astype(np.float32)
    return table[row.astype(int) % 64, column.astype(int) % 64]


def lit(rng, height):
    """Brightness of a surface of this height (in pixels) under slanting light."""
    angle = rng.uniform(0.6, 1.0) * np.pi
    down, across = np.gradient(height)
    return (1 + np.cos(angle) * across + np.sin(angle) * down)[..., None].clip(0.3, 1.7)


def set_in(rng, edge, face, joint, gap, bevel, rough):
    """Pieces of colour `face` in mortar; edge: the distance to a piece's border."""
    edge = edge - gap / 2
    grain = noise(rng, edge.shape, rng.uniform(4, 16), 4)
    mask = (edge + 0.5).clip(0, 1)[..., None]
    height = bevel * np.sqrt((edge / (2 * bevel)).clip(0, 1)) + rough * grain
    face = face * (1 + 0.3 * rough * grain[..., None])
    joint = joint * (1 + 0.06 * noise(rng, edge.shape, 3, 2)[..., None])
    return (joint + mask * (face - joint)) * lit(rng, height * 0.6)


def voronoi(rng, shape, cell):
    """Cells around scattered points: distance to the border, and the cell's place."""
    x, y = plane(rng, shape, 40, cell / 30, cell)
    at = ((x + 1j * y) / cell)[::2, ::2]          # half the resolution is enough here
    column, row = at.real.astype(int), at.imag.astype(int)
    points = rng.uniform(0.1, 0.9, (2, 64, 64)).astype(np.float32)
    points = points[0] + 1j * points[1]
    first = second = np.full(at.shape, 9 + 9j, np.complex64)     # from here to a point
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            step = points[(row + i) % 64, (column + j) % 64]
            step += (column + j - at.real) + 1j * (row + i - at.imag)
            far = np.abs(step)
            nearest = far < np.abs(first)
            nearer = far < np.abs(second)
            second = np.where(nearest, first, np.where(nearer, step, second))
            first = np.where(nearest, step, first)
    edge = np.abs(second) ** 2 - np.abs(first) ** 2
    edge = Image.fromarray(edge / (2 * np.abs(first - second)) * cell)
    place = (at + first).repeat(2, 0).repeat(2, 1)
    edge = np.asarray(edge.resize(shape[::-1], Image.BILINEAR))
    return edge, np.floor(place.real), np.floor(place.imag)


def boxed(x, y, width, height):
    """Distance from the border of a rectangle whose corner is at 0, 0."""
    return np.minimum(np.minimum(x, width - x), np.minimum(y, height - y))


def bricks(rng, shape, held_out):
    height = rng.uniform(15, 42)
    width = height * rng.uniform(2, 3.3)
    x, y = plane(rng, shape, 6, rng.uniform(0.2, 0.9), 10)
    row = np.floor(y / height)
    x = x + row * width * rng.choice([0.5, 0.5, 0.333])
    column = np.floor(x / width)
    hue = (0, 0.16) if rng.random() < 0.7 else (0, 1)
    base = colour(rng, hue, (0.1, 0.7), (0.4, 0.85), held_out)
    odd = per_cell(rng, column, row, 4)
    face = base * (1 + 0.14 * odd[..., :1]) + 0.025 * odd[..., 1:]
    joint = np.float32(rng.uniform(0.25, 0.85)) * (0.8 + 0.2 * base)
    edge = boxed(x - column * width, y - row * height, width, height)
    return set_in(rng, edge, face, joint, rng.uniform(1.5, 4.5), rng.uniform(0.8, 2),
                  rng.uniform(0.05, 0.3))


def tiles(rng, shape, held_out):
    side = rng.uniform(16, 60)
    turn = rng.choice([5, 50])
    x, y = plane(rng, shape, turn, rng.uniform(0, 0.5), 20)
    column, row = np.floor(x / side), np.floor(y / side)
    base = colour(rng, (0, 1), (0.1, 0.8), (0.3, 0.9), held_out)
    other = colour(rng, (0, 1), (0, 0.6), (0.3, 1), held_out)
    odd = per_cell(rng, column, row, 2)
    chosen = odd[..., 0] > 0.7
    if rng.random() < 0.4:
        chosen = (column + row) % 2 > 0
    face = np.where(chosen[..., None], other, base) * (1 + 0.1 * odd[..., 1:])
    face = face * (1 + 0.07 * noise(rng, shape, side / 2, 3)[..., None])
    joint = np.full(3, rng.choice([0.2, 0.6, 0.85]), np.float32)
    edge = boxed(x - column * side, y - row * side, side, side)
    return set_in(rng, edge, face, joint, rng.uniform(1.2, 4), rng.uniform(0.8, 2.5),
                  rng.uniform(0.02, 0.15))


def cloth(rng, shape, held_out):
    thread = rng.uniform(4.5, 11)
    x, y = plane(rng, shape, rng.choice([5, 30]), thread / 12, 25)
    x, y = x / thread, y / thread
    column, row = np.floor(x), np.floor(y)
    step, period, over = [(1, 2, 1), (1, 3, 1), (1, 4, 2), (1, 3, 2)][rng.integers(4)]
    up = (column + step * row) % period < over
    colours = [colour(rng, (0, 1), (0.05, 0.7), (0.2, 0.95), held_out)
               for _ in range(4)]
    kind = rng.integers(3)                        # plain, two-coloured or checked
    first = np.tile(colours[0], (64, 1))
    second = np.tile(colours[min(kind, 1)], (64, 1))
    if kind == 2:
        for k, band in enumerate(np.cumsum(rng.integers(1, 10, 24)) % 64):
            first[band:] = colours[k % 4]
        second = first
    warp, weft = first[column.astype(int) % 64], second[row.astype(int) % 64]
    across = np.where(up, x - column, y - row) - 0.5
    along = np.where(up, y - row, x - column) - 0.5
    shade = (1.05 - 2.2 * across ** 2) * (1.05 - 0.9 * along ** 2)
    fibre = noise(rng, shape, 1.5, 1) * 0.05 + noise(rng, shape, 12, 3) * 0.04
    odd = per_cell(rng, column, row, 1) * 0.06
    return np.where(up[..., None], warp, weft) * ((shade + fibre)[..., None] + odd)


def paving(rng, shape, held_out, cell=(24, 70), gap=(2, 6), bevel=(1, 3)):
    edge, column, row = voronoi(rng, shape, rng.uniform(*cell))
    hue = (0, 0.16) if rng.random() < 0.6 else (0, 1)
    base = colour(rng, hue, (0.02, 0.35), (0.4, 0.85), held_out)
    odd = per_cell(rng, column, row, 4)
    face = base * (1 + 0.18 * odd[..., :1]) + 0.02 * odd[..., 1:]
    joint = base * np.float32(rng.uniform(0.25, 0.6))
    return set_in(rng, edge, face, joint, rng.uniform(*gap), rng.uniform(*bevel),
                  rng.uniform(0.08, 0.35))


def pebbles(rng, shape, held_out):
    return paving(rng, shape, held_out, (10, 26), (0.8, 2), (1.5, 4))


def wood(rng, shape, held_out):
    x, y = plane(rng, shape, 6, 0.3, 40)
    plank = rng.uniform(40, 160)
    row = np.floor(y / plank)
    odd = per_cell(rng, row * 0, row, 3)
    bend = noise(rng, shape, (30, 160), 2) * rng.uniform(0.4, 1.6)
    rings = (y / rng.uniform(5, 14) + bend + 9 * odd[..., 0]) % 1
    fibres = noise(rng, shape, (1.5, 30), 2)
    base = colour(rng, (0.02, 0.16), (0.25, 0.65), (0.4, 0.9), held_out)
    shade = 1 - 0.3 * rings ** 3 + 0.08 * fibres + 0.08 * odd[..., 1]
    shade = shade - 0.25 * (noise(rng, shape, (1, 9), 1) > 2)
    edge = np.minimum(y - row * plank, row * plank + plank - y)
    shade = shade * (0.25 + 0.75 * (edge / 1.6).clip(0, 1))
    return base ** (1.6 - 0.6 * shade[..., None]) * shade[..., None]


def wall(rng, shape, held_out):
    x, y = plane(rng, shape, 180)
    ends = [colour(rng, (0, 1), (0, 0.7), (0.2, 1), held_out) for _ in range(2)]
    part = (x - x.min()) / (x.max() - x.min())
    face = ends[0] + part[..., None] * (ends[1] - ends[0]) * rng.uniform(0.2, 1)
    grain = noise(rng, shape, rng.uniform(3, 30), 5) * rng.uniform(0, 0.8)
    return face * (1 + 0.03 * grain[..., None]) * lit(rng, grain * 0.5)


def stripes(rng, shape, held_out):
    x, _ = plane(rng, shape, 90, rng.choice([0, 4.0]), 70)
    borders = np.cumsum(rng.uniform(*rng.choice([[3, 9], [4, 30], [10, 50]]), 700))
    colours = np.array([colour(rng, (0, 1), (0, 0.9), (0.1, 1), held_out)
                        for _ in range(rng.integers(2, 6))])
    face = colours[np.searchsorted(borders, x - x.min()) % len(colours)]
    return face * (1 + 0.02 * noise(rng, shape, 8, 4)[..., None])


def shingles(rng, shape, held_out):
    width = rng.uniform(18, 50)
    height = width * rng.uniform(0.6, 1)
    bow = rng.choice([0, 0.3, 0.5]) * height
    x, y = plane(rng, shape, 5, rng.uniform(0.2, 0.6), 15)
    row = np.floor(y / height)
    above = (x / width + row / 2 + 0.5) % 1       # the row above hangs over this one
    row = row - (y < row * height + bow * (1 - (2 * above - 1) ** 2))
    column = np.floor(x / width + row / 2)
    u = x / width + row / 2 - column
    above = (u + 0.5) % 1
    top = row * height + bow * (1 - (2 * above - 1) ** 2)
    bottom = (row + 1) * height + bow * (1 - (2 * u - 1) ** 2)
    hue = (0, 0.16) if rng.random() < 0.6 else (0, 1)
    base = colour(rng, hue, (0.05, 0.6), (0.3, 0.8), held_out)
    odd = per_cell(rng, column, row, 4)
    face = base * (1 + 0.15 * odd[..., :1]) + 0.02 * odd[..., 1:]
    face = face * (0.6 + 0.4 * ((y - top) / height * 2).clip(0, 1)[..., None])
    edge = np.minimum(width * np.minimum(u, 1 - u), bottom - y)
    return set_in(rng, edge, face, base * 0.25, 1.5, 1.2, rng.uniform(0.05, 0.25))


def poster(rng, shape, held_out):
    inks = [tuple(int(255 * c) for c in
                  colour(rng, (0, 1), (0, 0.9), (0.05, 1), held_out)) for _ in range(6)]
    image = Image.new("RGB", shape[::-1], inks[0])
    canvas = ImageDraw.Draw(image)
    names = HELD_OUT_FONTS if held_out else FONTS
    for _ in range(rng.integers(8, 30)):
        ink = inks[rng.integers(1, 6)]
        x, y = rng.uniform(0, shape[1]), rng.uniform(0, shape[0])
        reach = np.exp(rng.uniform(np.log(20), np.log(220)))
        kind = rng.integers(5)
        if kind == 0:
            canvas.circle((x, y), reach, ink)
        elif kind == 1:
            canvas.circle((x, y), reach, None, ink, round(rng.uniform(3, 20)))
        elif kind == 2:
            corners = rng.uniform(-1.5, 1.5, (rng.integers(3, 5), 2)) * reach + [x, y]
            canvas.polygon([tuple(corner) for corner in corners], ink)
        elif kind == 3:
            ends = rng.uniform(0, 1, (2, 2)) * shape[::-1]
            canvas.line([tuple(end) for end in ends], ink, round(rng.uniform(2, 16)))
        else:
            letter = "ABCDEFGHKMNPRSTWXYZ2345689&"[rng.integers(27)]
            canvas.text((x, y), letter, ink, font(rng.choice(names), 20 + reach),
                        anchor="mm")
    return np.asarray(image, np.float32) / 255


PATTERNS = (bricks, tiles, cloth, paving, pebbles, wood, wall, stripes, shingles,
            poster, bricks, tiles, cloth, cloth)


def pattern(rng, held_out=False):
    """A picture of a material or of simple shapes."""
    drawn = PATTERNS[rng.integers(len(PATTERNS))]
    return picture(drawn(rng, size(rng), held_out))


def next_word(rng, held_out):
    words = HELD_OUT_WORDS if held_out else WORDS
    word = words[rng.integers(len(words))]
    kind = rng.random()
    if kind < 0.06:
        return str(rng.integers(2, 10 ** rng.integers(1, 5)))
    if kind < 0.20:
        return word.capitalize()
    if kind < 0.24:
        return word.upper()
    return word + rng.choice(["", "", "", "", "", "", "", ",", ".", "?"])


def paper_and_ink(rng, held_out):
    """Two legible colours: light paper, dark ink; the other way for one in four."""
    paper = colour(rng, (0, 1), (0, rng.choice([0.02, 0.35])), (0.85, 1), held_out)
    ink = colour(rng, (0, 1), (0, 0.9), (0, rng.choice([0.1, 0.45])), held_out)
    if rng.random() < 0.25:
        return ink, paper
    return paper, ink


def page(rng, held_out=False):
    """A page of words."""
    shape = size(rng)
    paper, ink = paper_and_ink(rng, held_out)
    names = HELD_OUT_FONTS if held_out else FONTS
    chosen = rng.choice(names, 2)
    pixels = rng.uniform(28, rng.choice([40, 64]))
    mixed = rng.random() < 0.3
    heading = rng.random() < 0.25
    cover = Image.new("L", shape[::-1], 0)
    canvas = ImageDraw.Draw(cover)
    margin = rng.uniform(-20, 40)
    spacing = rng.uniform(1.0, 1.35)
    y = rng.uniform(-1, 0.5) * pixels
    line = 0
    while y < shape[0]:
        now = rng.uniform(1.3, 2.2) * pixels if heading and line == 1 else pixels
        face = font(chosen[int(mixed and line % 2)], now)
        x = margin
        y += 2 * now * spacing
        while x < shape[1]:
            word = next_word(rng, held_out)
            canvas.text((x, y), word, 255, face, anchor="ls")
            x += face.getlength(word) + 0.3 * 2 * now
        line += 1
    if rng.random() < 0.3:
        cover = cover.rotate(rng.uniform(-6, 6), Image.BICUBIC)
    cover = np.asarray(cover, np.float32)[..., None] / 255
    if rng.random() < 0.25:
        shade = noise(rng, shape, 200)[..., None]
        paper = paper * (1 + 0.06 * shade)
    return picture(paper + cover * (ink - paper))


def draw(i, seed, held_out=False):
    """Picture i of a seed."""
    rng = np.random.default_rng([seed, i] + held_out * [zlib.crc32(b"held-out")])
    return pattern(rng, held_out) if i % 2 else page(rng, held_out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", action="store_true")
    options = parser.parse_args()
    os.makedirs(options.folder, exist_ok=True)
    for i in tqdm(range(options.count), disable=None):
        name = f"{'pattern' if i % 2 else 'page'}_{i:04}.png"
        image = draw(i, options.seed, options.held_out)
        image.save(os.path.join(options.folder, name))


if __name__ == "__main__":
    main()
