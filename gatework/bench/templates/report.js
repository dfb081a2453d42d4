"use strict";
(() => {
  const specs = JSON.parse(document.getElementById("figures").textContent);
  const style = () => getComputedStyle(document.documentElement);
  const variable = (name) => style().getPropertyValue("--" + name).trim();

  // "@c2/0.3" is the page's colour --c2 at an opacity of 0.3.
  const colour = (token) => {
    const [name, opacity] = token.slice(1).split("/");
    const hex = variable(name);
    if (!opacity) return hex;
    const channels = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
    return `rgba(${channels.join(",")},${opacity})`;
  };
  const resolve = (value, key) => {
    if (Array.isArray(value)) return value.map((item) => resolve(item, key));
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, resolve(v, k)]));
    return typeof value === "string" && /color$/.test(key) && value[0] === "@" ? colour(value) : value;
  };

  const axis = (own) => ({
    gridcolor: variable("grid"), linecolor: variable("line"), zerolinecolor: variable("line"), ticks: "outside", tickcolor: variable("line"),
    automargin: true, ...own, title: { standoff: 10, font: { size: 13 }, ...(own || {}).title },
  });
  const layout = (spec, own = spec.layout) => ({
    font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: variable("muted") },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 56, r: 14, t: 10, b: 46 }, hovermode: "closest",
    hoverlabel: { bgcolor: variable("surface"), bordercolor: variable("line"), font: { color: variable("ink"), size: 13 } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: variable("muted"), activecolor: variable("accent") },
    // The page's own legend names the variants; a plot's own only what is special to it.
    showlegend: spec.data.some((trace) => trace.showlegend && !trace.legendgroup),
    legend: { orientation: "h", y: -0.22, yanchor: "top", x: 0, font: { color: variable("ink"), size: 12.5 } },
    ...resolve(own, ""), xaxis: axis(resolve(own.xaxis, "")), yaxis: axis(resolve(own.yaxis, "")),
  });
  // Without a mouse the buttons would always cover the top of the plot.
  const config = {
    responsive: true, displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false, displaylogo: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"], showSendToCloud: false, plotlyServerURL: "",
  };

  // A curve starts at its second half, where the variants part; a button shows it whole.
  const whole = new Set();
  const ranged = (spec) => {
    const made = layout(spec);
    if (spec.zoom && !whole.has(spec.id)) {
      made.xaxis.range = [...spec.zoom.x];
      made.yaxis.range = [...spec.zoom.y];
    }
    return made;
  };
  const hidden = new Set();
  const traces = (spec) => resolve(spec.data, "").map((trace) => ({ ...trace, visible: !hidden.has(trace.legendgroup) }));
  const react = (spec) => Plotly.react(spec.id, traces(spec), ranged(spec), config);
  const draw = () => Promise.all(specs.map(react));

  for (const button of document.querySelectorAll("button[data-figure]")) {
    const spec = specs.find((one) => one.id === button.dataset.figure);
    button.addEventListener("click", () => {
      if (!whole.delete(spec.id)) whole.add(spec.id);
      button.textContent = whole.has(spec.id) ? "Second half" : "Whole run";
      react(spec);
    });
  }
  const names = [...document.querySelectorAll("button[data-variant]")];
  const show = () => {
    for (const button of names) button.setAttribute("aria-pressed", String(!hidden.has(button.dataset.variant)));
    return draw();
  };
  for (const button of names) {
    const own = button.dataset.variant;
    button.addEventListener("click", () => {
      if (!hidden.delete(own)) hidden.add(own);
      show();
    });
    button.addEventListener("dblclick", () => {  // Two clicks came before it, so the variant is as it was.
      const others = new Set(names.map((one) => one.dataset.variant).filter((name) => name !== own));
      const alone = !hidden.has(own) && [...others].every((name) => hidden.has(name));
      hidden.clear();
      if (!alone) for (const name of others) hidden.add(name);
      show();
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw().then(() => { document.documentElement.dataset.drawn = "true"; });
})();
