"""How plants and the things on a desk are drawn."""

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


_PAPER: Colour = (244, 240, 226)
_STEEL: Colour = (188, 194, 202)


def leaf(canvas: Canvas, rng: np.random.Generator) -> None:
    """A maple leaf, its tip towards -y: five pointed lobes, veins, a stalk."""
    colour = hsv(rng, (0, 105), (0.6, 0.95), (0.5, 0.95))
    vein = lighter(colour, 0.45) if rng.random() < 0.6 else darker(colour, 0.4)
    depth = rng.uniform(0.36, 0.46)
    right = [
        (0, 1.0),
        (9, 0.7),
        (17, 0.72),
        (27, depth),
        (42, 0.72),
        (52, 0.98),
        (63, 0.7),
        (78, depth + 0.02),
        (92, 0.6),
    ]
    right += [(108, 0.76), (128, 0.5), (150, 0.42), (172, 0.3)]
    polar = np.array(right + [(-a, r) for a, r in right[:0:-1]]) * (np.pi / 180, 1)
    outline = np.stack([polar[:, 1] * np.sin(polar[:, 0]), -polar[:, 1] * np.cos(polar[:, 0])], axis=1)
    canvas.stroke(
        smooth([(0, 0.2), (0.03, 0.6), (rng.uniform(-0.2, 0.2), 0.95)], closed=False), 0.07, darker(colour, 0.35)
    )
    canvas.fill(outline + np.array([0, 0.1]), colour)
    canvas.glaze(outline * (0.7, 0.75) + (0, 0.12), lighter(colour, 0.35), 0.35)
    for angle, reach in ((0, 0.88), (52, 0.84), (-52, 0.84), (108, 0.62), (-108, 0.62)):
        tip = turned([(0.0, -reach)], angle)[0] + (0, 0.1)
        across = turned([(0.025, 0.0)], angle)[0]
        canvas.glaze([(across[0], 0.3 + across[1]), (tip[0], tip[1]), (-across[0], 0.3 - across[1])], vein, 0.9)


def mushroom(canvas: Canvas, rng: np.random.Generator) -> None:
    """A mushroom seen from the side: domed cap with spots, gills beneath, a stem with a ring."""
    cap = (
        hsv(rng, (345, 405), (0.45, 0.95), (0.45, 0.95))
        if rng.random() < 0.75
        else hsv(rng, (240, 340), (0.2, 0.5), (0.5, 0.85))
    )
    flesh = hsv(rng, (30, 55), (0.05, 0.25), (0.8, 1))
    canvas.fill(
        smooth([(-0.17, 0.0), (0.17, 0.0), (0.2, 0.5), (0.3, 0.86), (0.0, 0.98), (-0.3, 0.86), (-0.2, 0.5)]), flesh
    )
    canvas.fill(smooth([(-0.2, 0.32), (0.2, 0.32), (0.31, 0.46), (0.0, 0.54), (-0.31, 0.46)]), darker(flesh, 0.16))
    canvas.fill(oval((0, 0.06), (0.86, 0.2)), darker(flesh, 0.25))
    for x in np.linspace(-0.7, 0.7, 11):
        canvas.glaze([(x * 0.3, 0.02), (x + 0.02, 0.24), (x - 0.02, 0.24)], darker(flesh, 0.5), 0.7)
    tall = rng.uniform(0.75, 1.0)
    dome = [
        (-0.92, 0.06),
        (-0.8, -0.36),
        (-0.42, -0.8 * tall),
        (0, -0.94 * tall),
        (0.42, -0.8 * tall),
        (0.8, -0.36),
        (0.92, 0.06),
    ]
    rim = [(0.55, -0.02), (0.0, -0.07), (-0.55, -0.02)]
    canvas.fill(smooth(dome + rim), cap)
    canvas.glaze(
        smooth([(-0.74, -0.2), (-0.5, -0.62 * tall), (-0.2, -0.76 * tall), (-0.42, -0.4)]), lighter(cap, 0.6), 0.4
    )
    if rng.random() < 0.75:
        for x, y in ((-0.55, -0.25), (-0.2, -0.52), (0.25, -0.68), (0.62, -0.3), (0.2, -0.24), (-0.1, -0.8)):
            size = rng.uniform(0.07, 0.14)
            canvas.glaze(oval((x + rng.uniform(-0.06, 0.06), y * tall), (size, size * 0.8)), lighter(flesh, 0.5), 0.95)


def cup(canvas: Canvas, rng: np.random.Generator) -> None:
    """A cup seen from above, its handle towards +x, mostly on a saucer, with coffee or tea in it."""
    china = hsv(rng, (0, 360), (0.0, 0.75), (0.6, 1))
    drink = hsv(rng, (18, 38), (0.6, 0.95), (0.22, 0.75))
    if rng.random() < 0.7:
        plate = china if rng.random() < 0.6 else lighter(hsv(rng, (0, 360), (0.1, 0.6), (0.7, 1)), 0.3)
        canvas.fill(oval((0, 0), (0.96, 0.96)), plate)
        canvas.stroke(oval((0, 0), (0.88, 0.88)), 0.04, darker(plate, 0.25), closed=True)
        canvas.glaze(oval((0, 0), (0.7, 0.7)), darker(plate, 0.3), 0.55)
    handle = smooth([(0.45, -0.13), (0.78, -0.17), (0.93, 0.0), (0.78, 0.17), (0.45, 0.13)], closed=False)
    canvas.stroke(handle, 0.19, darker(china, 0.45))
    canvas.stroke(handle, 0.12, china)
    canvas.fill(oval((0, 0), (0.62, 0.62)), darker(china, 0.4))
    canvas.fill(oval((0, 0), (0.59, 0.59)), lighter(china, 0.35))
    canvas.glaze(oval((0, 0), (0.51, 0.51)), darker(china, 0.35))
    canvas.glaze(oval((0.02, 0.02), (0.45, 0.45)), drink)
    if rng.random() < 0.5:
        canvas.glaze(
            smooth([(0, 0.26), (-0.25, 0.0), (-0.16, -0.2), (0, -0.08), (0.16, -0.2), (0.25, 0.0)]),
            lighter(drink, 0.7),
            0.8,
        )
    turn = rng.uniform(0, 360)
    canvas.glaze(turned(smooth([(0.3, -0.26), (0.38, 0.0), (0.3, 0.26), (0.33, 0.0)]), turn), (255, 255, 255), 0.6)


def scissors(canvas: Canvas, rng: np.random.Generator) -> None:
    """Open scissors, the blades towards +x: two blades, a screw, two coloured rings."""
    grip = hsv(rng, (0, 360), (0.3, 0.95), (0.3, 0.95))
    opening = rng.uniform(13, 24)
    for half in (1, -1):
        blade = np.array([(-0.16, -0.08), (0.35, -0.09), (1.04, 0.03), (0.35, 0.09), (-0.16, 0.1)]) * (1, half)
        shade = darker(_STEEL, 0.25 if half == 1 else 0.05)
        canvas.fill(turned(blade, half * opening), shade)
        edge = np.array([(0.0, 0.055), (0.4, 0.055), (1.0, 0.03), (0.4, 0.085), (0.0, 0.095)]) * (1, half)
        canvas.glaze(turned(edge, half * opening), lighter(shade, 0.6))
        ring = oval((-0.66, -0.14 * half), (0.3, 0.2), -10 * half)
        canvas.stroke(turned([(-0.05, 0.0), (-0.4, -0.04 * half)], half * opening), 0.17, grip)
        canvas.stroke(turned(ring, half * opening), 0.13, grip, closed=True)
        canvas.stroke(turned(ring, half * opening), 0.04, lighter(grip, 0.35), closed=True)
    canvas.fill(oval((0, 0), (0.08, 0.08)), darker(_STEEL, 0.55))
    canvas.fill(oval((0, 0), (0.045, 0.045)), lighter(_STEEL, 0.4))


def book(canvas: Canvas, rng: np.random.Generator) -> None:
    """A closed book seen from above: cover with spine, title and emblem, the pages' edge at two sides."""
    cover = hsv(rng, (0, 360), (0.3, 0.95), (0.3, 0.9))
    print_ = lighter(cover, 0.75) if rng.random() < 0.7 else darker(cover, 0.65)
    canvas.fill([(-0.66, -0.9), (0.76, -0.9), (0.76, 1.0), (-0.6, 1.0)], darker(cover, 0.45))
    canvas.fill([(-0.66, -0.9), (0.73, -0.9), (0.73, 0.97), (-0.6, 0.97)], _PAPER)
    for step in (0.025, 0.05):
        canvas.stroke(
            [(-0.58, 0.9 + step), (0.66 + step, 0.9 + step), (0.66 + step, -0.86)], 0.012, darker(_PAPER, 0.35)
        )
    canvas.fill([(-0.74, -1.0), (0.66, -1.0), (0.66, 0.88), (-0.74, 0.88)], cover)
    canvas.glaze([(-0.74, -1.0), (-0.56, -1.0), (-0.56, 0.88), (-0.74, 0.88)], darker(cover, 0.45), 0.8)
    canvas.stroke([(-0.46, -0.9), (0.56, -0.9), (0.56, 0.78), (-0.46, 0.78)], 0.025, print_, closed=True)
    title = rng.uniform(-0.75, -0.5)
    for line in range(int(rng.integers(2, 4))):
        half, y = rng.uniform(0.2, 0.38), title + 0.17 * line
        canvas.glaze([(0.05 - half, y), (0.05 + half, y), (0.05 + half, y + 0.08), (0.05 - half, y + 0.08)], print_)
    emblem = oval((0.05, 0.36), (0.24, 0.24))
    canvas.glaze(emblem if rng.random() < 0.5 else emblem[::7], print_, 0.9)
    canvas.glaze(oval((0.05, 0.36), (0.12, 0.12)), cover)


def lily_pad(canvas: Canvas, rng: np.random.Generator) -> None:
    """Clutter: a round floating leaf with a notch."""
    colour = hsv(rng, (85, 150), (0.35, 0.75), (0.3, 0.65))
    t = np.radians(np.linspace(14, 346, 40))
    disc = np.stack([np.cos(t), np.sin(t)], axis=1) * (0.95 + 0.03 * np.sin(5 * t))[:, None]
    canvas.fill(np.concatenate([disc, [(0.12, 0.0)]]), darker(colour, 0.2))
    canvas.glaze(np.concatenate([disc * 0.93, [(0.12, 0.0)]]), colour)
    for angle in range(30, 350, 32):
        canvas.stroke(turned([(0.0, 0.0), (0.86, 0.0)], angle), 0.02, lighter(colour, 0.22))


def stone(canvas: Canvas, rng: np.random.Generator) -> None:
    """Clutter: a rounded stone."""
    grey = hsv(rng, (20, 260), (0.02, 0.2), (0.35, 0.75))
    t = np.linspace(0, 2 * np.pi, 8, endpoint=False)
    reach = rng.uniform(0.65, 1.0, 8)
    outline = smooth(np.stack([reach * np.cos(t), 0.8 * reach * np.sin(t)], axis=1))
    canvas.fill(outline, grey)
    canvas.glaze(outline * 0.55 - (0.12, 0.15), lighter(grey, 0.35), 0.4)


def daisy(canvas: Canvas, rng: np.random.Generator) -> None:
    """Clutter: a small flower."""
    petal = hsv(rng, (0, 360), (0.0, 0.25), (0.85, 1))
    for angle in range(0, 360, 36):
        canvas.fill(turned(oval((0.6, 0), (0.4, 0.17)), angle), petal)
    canvas.fill(oval((0, 0), (0.33, 0.33)), hsv(rng, (38, 52), (0.7, 0.95), (0.8, 1)))


def twig(canvas: Canvas, rng: np.random.Generator) -> None:
    """Clutter: a twig with side shoots."""
    bark = hsv(rng, (15, 40), (0.25, 0.6), (0.25, 0.55))
    canvas.stroke(smooth([(-1, 0.1), (-0.3, -0.04), (0.4, 0.06), (1.0, -0.1)], closed=False), 0.07, bark)
    shoot = np.array([(-0.2, 0.0), (0.05, 0.2), (0.2, 0.4)])
    canvas.stroke(shoot, 0.05, bark)
    canvas.stroke(flipped(shoot) + np.array([0.5, 0.05]), 0.05, bark)


def sheet(canvas: Canvas, rng: np.random.Generator) -> None:
    """Clutter: a sheet of paper with lines of writing."""
    paper = hsv(rng, (30, 220), (0.0, 0.12), (0.86, 1))
    ink = hsv(rng, (200, 260), (0.1, 0.7), (0.25, 0.55))
    canvas.fill([(-0.72, -1.0), (0.72, -1.0), (0.72, 1.0), (-0.72, 1.0)], paper)
    for y in np.arange(-0.8, 0.85, 0.16):
        end = rng.uniform(0.1, 0.58)
        canvas.stroke([(-0.58, y), (end, y)], 0.02, ink)


def note(canvas: Canvas, rng: np.random.Generator) -> None:
    """Clutter: a sticky note."""
    colour = hsv(rng, (0, 360), (0.25, 0.5), (0.9, 1))
    canvas.fill([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.45), (0.45, 0.8), (-0.8, 0.8)], colour)
    canvas.fill([(0.8, 0.45), (0.45, 0.8), (0.42, 0.42)], darker(colour, 0.22))
    for y in (-0.45, -0.15, 0.15):
        canvas.stroke([(-0.5, y), (rng.uniform(0.0, 0.5), y)], 0.045, darker(colour, 0.6))


def pencil(canvas: Canvas, rng: np.random.Generator) -> None:
    """Clutter: a pencil, its point towards +x."""
    paint = hsv(rng, (0, 360), (0.5, 0.95), (0.5, 0.95))
    canvas.fill([(-1.0, -0.07), (0.7, -0.07), (0.7, 0.07), (-1.0, 0.07)], paint)
    canvas.glaze([(-1.0, -0.07), (0.7, -0.07), (0.7, -0.02), (-1.0, -0.02)], lighter(paint, 0.4), 0.6)
    canvas.fill([(0.7, -0.07), (1.0, 0.0), (0.7, 0.07)], (226, 190, 140))
    canvas.fill([(0.9, -0.025), (1.0, 0.0), (0.9, 0.025)], darker(paint, 0.6))
    canvas.fill([(-1.0, -0.07), (-0.88, -0.07), (-0.88, 0.07), (-1.0, 0.07)], (206, 120, 124))
