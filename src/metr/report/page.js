(function () {
  "use strict";
  const byId = (name) => document.getElementById(name);
  const all = (selector, root) => Array.from((root || document).querySelectorAll(selector));

  // tables that can be sorted by a column
  const value = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent.trim().toLowerCase() : cell.dataset.value;
  };
  const order = (one, other, numeric) => {
    if (!numeric) return one.localeCompare(other);
    // what was not measured comes last, whichever way the others go
    if (one === "" || other === "") return null;
    return Number(one) - Number(other);
  };
  all("table.sortable").forEach((table) => {
    const body = table.tBodies[0];
    all("thead th", table).forEach((head, column) => {
      const button = head.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const numeric = head.dataset.numeric !== undefined;
        const now = head.getAttribute("aria-sort");
        const sign = now === null ? (numeric ? -1 : 1) : now === "ascending" ? -1 : 1;
        all("thead th", table).forEach((one) => one.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
        const rows = Array.from(body.rows);
        rows.sort((one, other) => {
          const a = value(one, column), b = value(other, column), found = order(a, b, numeric);
          return found === null ? (a === "") - (b === "") : sign * found;
        });
        body.append(...rows);
      });
    });
  });

  // names that contain what is typed, of one dataset or of all
  const search = byId("search"), dataset = byId("dataset"), told = byId("rows-told");
  const sift = () => {
    const wanted = search.value.trim().toLowerCase(), where = dataset ? dataset.value : "";
    let number = 0;
    all("#name-table tbody tr").forEach((row) => {
      const fits = row.dataset.name.includes(wanted) && (where === "" || row.dataset.dataset === where);
      row.hidden = !fits;
      number += fits;
    });
    told.textContent = number + " shown";
  };
  if (search) {
    search.addEventListener("input", sift);
    if (dataset) dataset.addEventListener("change", sift);
  }

  // one of many precision-recall curves
  all("select[data-curves]").forEach((select) => {
    const lines = all("[data-line]", byId(select.dataset.curves));
    select.addEventListener("change", () => {
      lines.forEach((line) => line.classList.toggle("chosen", line.dataset.line === select.value));
      const chosen = lines.find((line) => line.dataset.line === select.value);
      if (chosen) chosen.parentNode.append(chosen);
    });
  });

  // what the pointer is at in a heat map
  const parsed = (name) => JSON.parse(byId(name).textContent);
  const maps = byId("presence-data") ? parsed("presence-data") : [];
  all("svg[data-map]").forEach((svg) => {
    const map = maps[Number(svg.dataset.map)], says = byId(svg.dataset.says);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), scale = map.width / box.width;
      const column = Math.floor(((event.clientX - box.left) * scale - map.left) / map.cell);
      const row = Math.floor(((event.clientY - box.top) * scale) / map.cell);
      if (row < 0 || column < 0 || row >= map.rows.length || column >= map.columns.length) return;
      const there = map.there[row][column] ? "annotated" : "not annotated";
      says.textContent = map.rows[row] + " in " + map.columns[column] + ": " + map.cells[row][column] + " %, " + there;
    });
  });

  // the worst images, one at a time
  const dialog = byId("viewer");
  if (!dialog) return;
  const images = parsed("worst-data"), thumbs = all(".thumb");
  let current = 0;
  const mark = (stage, box) => {
    const frame = document.createElement("b"), label = document.createElement("i");
    frame.className = box.kind + (box.y < 6 ? " low" : "") + (box.x > 65 ? " end" : "");
    frame.style.left = box.x + "%";
    frame.style.top = box.y + "%";
    frame.style.width = box.width + "%";
    frame.style.height = box.height + "%";
    label.dir = "auto";
    label.textContent = box.score === null ? box.name : box.name + " " + box.score.toFixed(2);
    frame.title = label.textContent + ", " + box.told;
    frame.append(label);
    stage.append(frame);
  };
  const fill = (stage, image, boxes, what) => {
    const shown = document.createElement("img");
    shown.src = thumbs[current].querySelector("img").src;
    shown.width = image.w;
    shown.height = image.h;
    shown.alt = what + ": " + (boxes.map((box) => box.name + " (" + box.told + ")").join(", ") || "nothing");
    stage.replaceChildren(shown);
    boxes.slice().sort((a, b) => b.width * b.height - a.width * a.height).forEach((box) => mark(stage, box));
  };
  const show = (number) => {
    current = (number + images.length) % images.length;
    const image = images[current];
    byId("viewer-title").textContent = (current + 1) + " of " + images.length + ": " + image.dataset + ", " + image.name;
    fill(byId("viewer-truth"), image, image.truth, "annotated");
    fill(byId("viewer-found"), image, image.found, "detected");
    byId("truth-told").textContent = image.truth.length;
    byId("found-told").textContent = image.found.length;
    byId("viewer-remarks").replaceChildren(...image.remarks.map((remark) => {
      const item = document.createElement("li");
      item.dir = "auto";
      item.textContent = remark;
      return item;
    }));
    dialog.scrollTop = 0;
  };
  thumbs.forEach((thumb, number) => thumb.addEventListener("click", () => {
    show(number);
    dialog.showModal();
  }));
  byId("viewer-back").addEventListener("click", () => show(current - 1));
  byId("viewer-on").addEventListener("click", () => show(current + 1));
  byId("viewer-close").addEventListener("click", () => dialog.close());
  byId("viewer-labels").addEventListener("change", (event) => dialog.classList.toggle("plain", !event.target.checked));
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") show(current - 1);
    if (event.key === "ArrowRight") show(current + 1);
  });
  dialog.addEventListener("close", () => thumbs[current].focus());
})();
