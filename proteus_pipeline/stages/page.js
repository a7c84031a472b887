"use strict";
(() => {
  const root = document.documentElement;
  const own = new Set(["light", "dark"]);
  const media = matchMedia("(prefers-color-scheme: dark)"), coarse = matchMedia("(pointer: coarse)");

  // Themes: the reader's system decides until the button does. A colour is asked of an element, since a variable's
  // value would be its text.
  const probe = document.createElement("span");
  probe.hidden = true;
  document.body.append(probe);
  const colour = name => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : media.matches);
  const button = document.getElementById("theme");
  const remembered = change => {
    try { return change(localStorage); } catch { return null; }  // pages from files may have none
  };
  const saved = remembered(store => store.getItem("proteus-theme"));
  if (own.has(saved)) root.dataset.theme = saved;
  const label = () => { button.textContent = dark() ? "Light theme" : "Dark theme"; };

  // Tabs, as the ARIA Authoring Practices Guide has them, with automatic activation.
  const shown = [];
  for (const box of document.querySelectorAll("[data-tabs]")) {
    const panels = [...box.children].filter(child => child.dataset.tab);
    if (panels.length < 2) continue;
    const list = document.createElement("div");
    list.setAttribute("role", "tablist");
    list.setAttribute("aria-label", box.dataset.tabs);
    const tabs = panels.map(panel => {
      const tab = document.createElement("button");
      tab.type = "button";
      tab.id = `${panel.id}-tab`;
      tab.textContent = tab.title = panel.dataset.tab;
      tab.setAttribute("role", "tab");
      tab.setAttribute("aria-controls", panel.id);
      panel.setAttribute("role", "tabpanel");
      panel.setAttribute("aria-labelledby", tab.id);
      panel.tabIndex = 0;
      return tab;
    });
    const select = (chosen, focus) => {
      tabs.forEach((tab, i) => {
        tab.setAttribute("aria-selected", String(i === chosen));
        tab.tabIndex = i === chosen ? 0 : -1;
        panels[i].hidden = i !== chosen;
      });
      if (focus) tabs[chosen].focus();
      shown.forEach(tell => tell());
    };
    tabs.forEach((tab, i) => {
      tab.addEventListener("click", () => select(i, false));
      tab.addEventListener("keydown", event => {
        const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: tabs.length - 1 }[event.key];
        if (to === undefined) return;
        event.preventDefault();
        select((to + tabs.length) % tabs.length, true);
      });
    });
    list.append(...tabs);
    box.prepend(list);
    select(0, false);
  }

  // Where the reader is, in the list of sections.
  const links = new Map([...document.querySelectorAll("nav a")].map(a => [a.hash.slice(1), a]));
  const sections = [...links.keys()].map(id => document.getElementById(id));
  const here = () => {
    const passed = sections.filter(section => section.getBoundingClientRect().top < innerHeight / 3);
    const end = scrollY + innerHeight >= document.body.scrollHeight - 2;
    const current = end ? sections.at(-1) : passed.at(-1) ?? sections[0];
    links.forEach((a, id) => {
      if (current && id === current.id) a.setAttribute("aria-current", "true");
      else a.removeAttribute("aria-current");
    });
  };
  addEventListener("scroll", here, { passive: true });
  here();

  // Figures.
  const plots = [...document.querySelectorAll("[data-figure]")];
  const figure = plot => JSON.parse(document.getElementById(`figure-${plot.dataset.figure}`).textContent);
  const axis = (given, t) => ({
    automargin: true, gridcolor: t.rule, zerolinecolor: t.muted, zeroline: false, linecolor: t.rule, ...given,
    title: { standoff: 12, ...given?.title },
  });
  // A contact map comes as pairs of residues.
  const square = ({ sequence, pairs }) => {
    const rows = () => Array.from(sequence, () => Array(sequence.length).fill(null));
    const z = rows(), hovertext = rows();
    for (const [i, j, percent] of pairs) {
      z[i - 1][j - 1] = z[j - 1][i - 1] = percent / 100;
      hovertext[i - 1][j - 1] = hovertext[j - 1][i - 1] = `${sequence[i - 1]}${i} and ${sequence[j - 1]}${j}<br>probability ${(percent / 100).toFixed(2)}`;
    }
    return { z, hovertext, x0: 1, y0: 1, dx: 1, dy: 1 };
  };
  const dressed = (trace, t) => trace.type === "heatmap"
    ? { ...trace, ...square(trace.meta), colorscale: [[0, t.low], [1, t.high]] }
    : trace.marker ? { ...trace, marker: { ...trace.marker, line: { ...trace.marker.line, color: t.muted } } } : trace;
  const draw = (plot, width) => {
    const t = Object.fromEntries(["ink", "muted", "rule", "paper", "low", "high"].map(name => [name, colour(name)]));
    const font = { family: getComputedStyle(document.body).fontFamily, size: 13, color: t.ink };
    const { data, layout } = figure(plot);
    const [first] = data;
    if (first.type === "heatmap") {
      // As high as leaves the map square, with its axis and the scale below it.
      layout.height = Math.min(layout.height, (width || plot.clientWidth) + 84);
      plot.style.minHeight = `${layout.height}px`;
    }
    plot.dataset.drawn = "";
    Plotly.react(plot, data.map(trace => dressed(trace, t)), {
      autosize: !width, ...(width && { width }), paper_bgcolor: t.paper, plot_bgcolor: t.paper, font,
      margin: { l: 48, r: 16, t: 32, b: 48 }, legend: { orientation: "h", x: 0, yref: "container", y: 0, yanchor: "bottom" },
      hoverlabel: { bgcolor: t.paper, bordercolor: t.muted, font, align: "left" }, modebar: { color: t.muted, activecolor: t.ink, bgcolor: t.paper },
      // A finger that passes over a figure scrolls the page.
      dragmode: coarse.matches ? false : "zoom", ...layout, xaxis: axis(layout.xaxis, t), yaxis: axis(layout.yaxis, t),
    }, {
      // plotly.js 4 would offer to upload the figure to its makers' cloud.
      showSendToCloud: false, plotlyServerURL: "", displaylogo: false, responsive: true,
      // Bars with their numbers beside them have nothing to point at.
      staticPlot: plot.dataset.figure === "scores", toImageButtonOptions: { format: "svg", filename: `proteus-${plot.dataset.figure}` },
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    });
  };
  const visible = plot => plot.getClientRects().length > 0;

  const themed = () => {
    label();
    if (!globalThis.Plotly) return;
    for (const plot of plots) {
      if (visible(plot)) draw(plot);
      else delete plot.dataset.drawn;
    }
  };
  label();
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    remembered(store => store.setItem("proteus-theme", root.dataset.theme));
    themed();
  });
  media.addEventListener("change", themed);

  // Pointing at a protein by its id, for those who use no pointer.
  const search = () => {
    const plot = plots.find(one => one.dataset.figure === "map");
    const field = document.getElementById("find"), answer = document.getElementById("found");
    if (!plot || !field) return;
    const plain = document.createElement("textarea");  // entities back to text
    const known = [];
    figure(plot).data.forEach((trace, curveNumber) => trace.hovertext.forEach((text, pointNumber) => {
      const [id, ...rest] = text.split("<br>").map(part => {
        plain.innerHTML = part.replace(/^<b>|<\/b>$/g, "");
        return plain.value;
      });
      known.push({ id, rest, point: { curveNumber, pointNumber } });
    }));
    const points = () => {
      const wanted = field.value.trim().toLowerCase();
      const fitting = wanted ? known.filter(one => one.id.toLowerCase().startsWith(wanted)) : [];
      const exact = fitting.filter(one => one.id.toLowerCase() === wanted);
      const [one] = exact.length ? exact : fitting;
      if (one && (exact.length || fitting.length === 1)) {
        answer.textContent = [one.id, ...one.rest].join(", ");
        Plotly.Fx.hover(plot, [one.point]);
      } else {
        answer.textContent = !wanted ? "" : fitting.length ? `${fitting.length} proteins begin so` : "no such protein is drawn";
        Plotly.Fx.unhover(plot);
      }
    };
    field.addEventListener("input", points);
    field.closest(".find").hidden = false;
  };

  const start = () => {
    const fill = () => plots.forEach(plot => { if (visible(plot) && !("drawn" in plot.dataset)) draw(plot); });
    fill();
    shown.push(fill);
    search();
    addEventListener("beforeprint", () => {
      root.classList.add("printing");
      // Of the paper's width, 673 pixels of A4: contact maps stand two by two.
      plots.forEach(plot => draw(plot, plot.dataset.figure.startsWith("contacts") ? 320 : 660));
    });
    addEventListener("afterprint", () => {
      root.classList.remove("printing");
      plots.forEach(plot => { plot.replaceChildren(); Plotly.purge(plot); delete plot.dataset.drawn; });
      fill();
    });
    root.dataset.ready = "";
  };
  const packed = document.getElementById("plotly");
  if (!packed) return;
  const bytes = Uint8Array.from(atob(packed.textContent), character => character.charCodeAt(0));
  new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).text().then(source => {
    const script = document.createElement("script");
    script.textContent = source;
    document.head.append(script);
    start();
  }).catch(() => { document.getElementById("no-plots").hidden = false; });
})();
