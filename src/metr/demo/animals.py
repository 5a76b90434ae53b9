"""How the animals of the demo's images are drawn, the head towards +x unless a painter says otherwise."""

import numpy as np

from metr.demo.canvas import Canvas, Colour, darker, flipped, hsv, lighter, oval, smooth, turned

_INK: Colour = (24, 22, 26)


def fish(canvas: Canvas, rng: np.random.Generator) -> None:
    """A carp seen from above: tapered body, forked tail, fins at both sides, patches."""
    ground = [hsv(rng, (8, 48), (0.55, 0.95), (0.75, 1)), hsv(rng, (20, 60), (0.02, 0.18), (0.85, 1))]
    ground.append(hsv(rng, (190, 260), (0.15, 0.5), (0.3, 0.65)))
    body = ground[int(rng.integers(3))]
    patch = [hsv(rng, (0, 35), (0.7, 0.95), (0.7, 0.95)), _INK, hsv(rng, (30, 55), (0.1, 0.3), (0.9, 1))][
        int(rng.integers(3))
    ]
    fin = lighter(body, 0.25)
    tail = smooth(
        [(-0.45, 0.04), (-0.72, 0.2), (-1.08, 0.42), (-0.95, 0.0), (-1.08, -0.42), (-0.72, -0.2), (-0.45, -0.04)]
    )
    canvas.fill(tail, fin)
    for end in (-0.3, -0.15, 0.15, 0.3):
        canvas.stroke([(-0.62, end / 4), (-0.98, end)], 0.03, darker(fin, 0.25))
    side = smooth([(0.5, 0.22), (0.28, 0.26), (-0.02, 0.5), (0.0, 0.68), (0.3, 0.56)])
    for half in (side, flipped(side)):
        canvas.fill(half, fin)
    outline = [(0.98, 0.0), (0.78, 0.19), (0.25, 0.31), (-0.3, 0.19), (-0.62, 0.07)]
    canvas.fill(smooth(outline + [(x, -y) for x, y in outline[:0:-1]]), body)
    for _ in range(int(rng.integers(2, 5))):
        spot = (rng.uniform(-0.4, 0.7), rng.uniform(-0.2, 0.2))
        canvas.glaze(oval(spot, (rng.uniform(0.12, 0.26), rng.uniform(0.1, 0.2)), rng.uniform(0, 180)), patch, 0.9)
    canvas.glaze(smooth([(0.3, 0.02), (-0.1, 0.07), (-0.4, 0.0), (-0.1, -0.07)]), darker(body, 0.35), 0.8)
    for y in (-0.16, 0.16):
        canvas.fill(oval((0.74, y), (0.065, 0.055)), _INK)


def turtle(canvas: Canvas, rng: np.random.Generator) -> None:
    """A turtle seen from above: shell with plates, four flippers, head, tail."""
    skin = hsv(rng, (50, 140), (0.3, 0.7), (0.4, 0.75))
    shell = hsv(rng, (15, 110), (0.35, 0.75), (0.3, 0.65))
    front = smooth([(0.3, 0.42), (0.5, 0.5), (0.78, 0.82), (0.72, 1.0), (0.45, 0.88), (0.2, 0.6)])
    rear = smooth([(-0.4, 0.4), (-0.25, 0.52), (-0.48, 0.84), (-0.72, 0.82), (-0.66, 0.58)])
    canvas.fill([(-0.6, 0.1), (-1.0, 0.0), (-0.6, -0.1)], skin)
    for limb in (front, flipped(front), rear, flipped(rear)):
        canvas.fill(limb, skin)
    canvas.fill(oval((0.84, 0), (0.25, 0.19)), skin)
    for y in (-0.1, 0.1):
        canvas.fill(oval((0.95, y), (0.045, 0.045)), _INK)
    canvas.fill(oval((0, 0), (0.74, 0.62)), darker(shell, 0.35))
    canvas.glaze(oval((0, 0), (0.64, 0.52)), shell)
    hexagon = oval((0, 0), (0.2, 0.19))[::5]
    for x, y, size in [
        (0, 0, 1.15),
        (0.4, 0, 0.9),
        (-0.4, 0, 0.9),
        (0.2, 0.33, 0.85),
        (-0.2, 0.33, 0.85),
        (0.2, -0.33, 0.85),
        (-0.2, -0.33, 0.85),
    ]:
        canvas.glaze(hexagon * size + (x, y), lighter(shell, 0.3), 0.75)
        canvas.glaze(hexagon * size * 0.55 + (x, y), darker(shell, 0.15), 0.6)


def frog(canvas: Canvas, rng: np.random.Generator) -> None:
    """A frog seen from above: folded hind legs with webbed feet, short arms, bulging eyes."""
    skin = hsv(rng, (35, 150), (0.5, 0.9), (0.5, 0.9))
    limb = darker(skin, 0.15)
    thigh = oval((-0.38, 0.46), (0.4, 0.17), -28)
    foot = [
        (-0.62, 0.66),
        (-0.3, 0.78),
        (-0.02, 0.7),
        (-0.06, 0.84),
        (0.04, 0.96),
        (-0.14, 0.94),
        (-0.3, 1.02),
        (-0.66, 0.84),
    ]
    arm = [(0.3, 0.3), (0.42, 0.62), (0.68, 0.66)]
    for half in (np.array([1.0, 1.0]), np.array([1.0, -1.0])):
        canvas.fill(thigh * half, limb)
        canvas.fill(np.array(foot) * half, limb)
        canvas.stroke(np.array([(-0.68, 0.58), (-0.56, 0.76)]) * half, 0.17, limb)
        canvas.stroke(np.array(arm) * half, 0.13, limb)
        for toe in ((0.86, 0.58), (0.88, 0.72), (0.78, 0.84)):
            canvas.stroke(np.array([(0.66, 0.67), toe]) * half, 0.06, limb)
    outline = [(0.88, 0.0), (0.76, 0.26), (0.46, 0.36), (0.1, 0.38), (-0.4, 0.36), (-0.72, 0.14)]
    canvas.fill(smooth(outline + [(x, -y) for x, y in outline[:0:-1]]), skin)
    canvas.glaze(
        smooth([(0.55, 0.05), (-0.2, 0.09), (-0.7, 0.02), (-0.7, -0.02), (-0.2, -0.09), (0.55, -0.05)]),
        lighter(skin, 0.45),
        0.8,
    )
    for _ in range(int(rng.integers(3, 8))):
        spot = (rng.uniform(-0.55, 0.4), rng.choice([-1, 1]) * rng.uniform(0.12, 0.32))
        canvas.glaze(oval(spot, (rng.uniform(0.04, 0.09), rng.uniform(0.04, 0.07))), darker(skin, 0.5), 0.8)
    for y in (-0.27, 0.27):
        canvas.fill(oval((0.58, y), (0.17, 0.15)), lighter(skin, 0.3))
        canvas.fill(oval((0.62, y * 1.08), (0.09, 0.08)), _INK)


def butterfly(canvas: Canvas, rng: np.random.Generator) -> None:
    """A butterfly with open wings, its head towards -y: four wings with borders and eye spots, feelers."""
    wing, border = hsv(rng, (0, 360), (0.45, 0.95), (0.75, 1)), darker(hsv(rng, (0, 360), (0.2, 0.7), (0.2, 0.5)), 0.3)
    lower_wing = wing if rng.random() < 0.5 else hsv(rng, (0, 360), (0.4, 0.9), (0.75, 1))
    spot = lighter(wing, 0.7)
    upper = smooth([(0.05, -0.12), (0.3, -0.62), (0.82, -0.9), (1.0, -0.62), (0.84, -0.16), (0.4, 0.05)])
    lower = smooth([(0.06, 0.02), (0.5, 0.0), (0.78, 0.24), (0.68, 0.66), (0.42, 0.86), (0.2, 0.56)])
    for half in (np.array([1.0, 1.0]), np.array([-1.0, 1.0])):
        for shape, colour in ((lower, lower_wing), (upper, wing)):
            canvas.fill(shape * half, border)
            middle = shape.mean(axis=0)
            inner = ((shape - middle) * 0.74 + middle * 0.94) * half
            canvas.glaze(inner, colour)
            canvas.glaze(((shape - middle) * 0.3 + middle * 1.12) * half, spot if shape is upper else border, 0.85)
        for x, y in ((0.9, -0.66), (0.86, -0.45), (0.66, 0.36), (0.55, 0.66)):
            canvas.glaze(oval((x * half[0], y), (0.05, 0.05)), spot)
        canvas.stroke(smooth(np.array([(0.02, -0.36), (0.1, -0.62), (0.22, -0.8)]) * half, closed=False), 0.035, _INK)
        canvas.fill(oval((0.22 * half[0], -0.8), (0.05, 0.05)), _INK)
    canvas.fill(oval((0, 0.02), (0.085, 0.44)), _INK)
    canvas.fill(oval((0, -0.4), (0.1, 0.1)), _INK)


def snail(canvas: Canvas, rng: np.random.Generator) -> None:
    """A snail seen from the side, its head at the right: spiral shell on a long foot, two stalked eyes."""
    flesh = hsv(rng, (15, 60), (0.15, 0.5), (0.55, 0.9))
    shell = (
        hsv(rng, (0, 60), (0.3, 0.8), (0.5, 0.9))
        if rng.random() < 0.75
        else hsv(rng, (180, 340), (0.2, 0.5), (0.6, 0.9))
    )
    foot = [
        (-1.0, 0.62),
        (-0.5, 0.4),
        (0.2, 0.38),
        (0.52, 0.12),
        (0.66, -0.14),
        (0.86, -0.16),
        (0.98, 0.02),
        (0.9, 0.3),
        (0.74, 0.56),
        (0.4, 0.66),
    ]
    for root, tip in (((0.72, -0.1), (0.62, -0.52)), ((0.84, -0.1), (0.95, -0.5))):
        canvas.stroke([root, tip], 0.065, darker(flesh, 0.1))
        canvas.fill(oval(tip, (0.07, 0.07)), _INK)
    canvas.fill(smooth(foot), flesh)
    canvas.glaze(smooth([(-0.9, 0.64), (-0.3, 0.55), (0.4, 0.56), (0.7, 0.5), (0.4, 0.7)]), darker(flesh, 0.3), 0.7)
    canvas.fill(oval((-0.16, -0.08), (0.64, 0.62)), shell)
    t = np.linspace(0.3, 5.2 * np.pi, 70)
    reach = 0.6 * (t / t[-1]) ** 1.15
    spiral = np.stack([-0.16 + reach * np.cos(t), -0.08 + reach * np.sin(t)], axis=1)
    canvas.stroke(spiral, 0.085, darker(shell, 0.5))
    canvas.glaze(turned(oval((-0.42, -0.38), (0.16, 0.07)), -40, (-0.42, -0.38)), lighter(shell, 0.75), 0.6)
