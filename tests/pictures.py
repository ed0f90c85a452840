"The README's pictures: screenshots with few colours."
from io import BytesIO

from PIL import Image


def few_colours(image, n):
    "Also the rare ones are kept; white stays white."
    few = image.quantize(n, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.putpalette([255 if v > 252 else v for v in few.getpalette()])
    return few


def png(shot):
    out = BytesIO()
    few_colours(Image.open(BytesIO(shot)).convert("RGB"), 128).save(out, "PNG", optimize=True)
    return out.getvalue()


def animation(shots, width=760):
    "Screenshots as one GIF; the last one stays longer."
    frames = [Image.open(BytesIO(s)).convert("RGB") for s in shots]
    high = max(f.height for f in frames)

    def on_paper(frame):
        page = Image.new("RGB", (frames[0].width, high), "white")
        page.paste(frame)
        return few_colours(page.resize((width, high * width // page.width), Image.Resampling.LANCZOS), 32)
    first, *rest = map(on_paper, frames)
    out = BytesIO()
    first.save(out, "GIF", save_all=True, append_images=rest, duration=[700] * len(rest) + [3000], loop=0, optimize=True)
    return out.getvalue()


def is_a_picture(data):
    "It is wide enough to be read and small in bytes, every frame has several colours, and none is nearly all of it."
    image = Image.open(BytesIO(data))
    assert 700 < image.width < 2000 and image.height > 100 and len(data) < 150_000, (image.size, len(data))
    for number in range(getattr(image, "n_frames", 1)):
        image.seek(number)
        counts = sorted((n for n, _ in image.convert("RGB").getcolors(1 << 24)), reverse=True)
        assert len(counts) > 8 and counts[0] < 0.99 * sum(counts), (number, counts[:3])


def part(notebook, first, last, margin=8, above=8):
    "A screenshot from the top of one thing to the bottom of another."
    for end in (last, first):
        end.scroll_into_view_if_needed()
    a, b = first.bounding_box(), last.bounding_box()
    clip = {"x": a["x"] - margin, "y": a["y"] - above, "width": a["width"] + 2 * margin,
            "height": b["y"] + b["height"] - a["y"] + 2 * above}
    return notebook.page.screenshot(clip=clip)
