// What the browser does by itself: window and level, zoom and pan, the side, the scale, names for a screen reader.
// One function of a dot within the widget, called once the dot has loaded.
(dot => {
    "use strict";
    const WHOLE = {zoom: 1, x: 0, y: 0, width: 100, level: 50};  // x, y: % of the frame; width, level: % of the greys
    const LIMITS = {zoom: [1, 16], width: [2, 200], level: [0, 100]};
    const STEP = 5;  // % for each press of an arrow key
    const HELP = "picture: plus and minus zoom, arrow keys do what dragging does, "
        + "with Shift the other of window and move, 0 shows the whole picture in its own greys";
    const clamp = (value, [low, high]) => Math.min(high, Math.max(low, value));

    const TOOLS = id => `
        <div class="rr-tool-row">
            <span role="group" aria-label="what dragging does">
                <button data-tool="window" title="Drag on the picture: right widens the window, down raises the level">
                    Window</button><button data-tool="move" title="Drag on the picture: it moves, once zoomed in">
                    Move</button>
            </span>
            <span role="group" aria-label="zoom">
                <button data-by="0.8" aria-label="zoom out" title="zoom out, or turn the wheel">−</button>
                <output aria-label="zoom">1×</output>
                <button data-by="1.25" aria-label="zoom in" title="zoom in, or turn the wheel">+</button>
            </span>
            <label>width <input type="number" data-of="width" min="2" max="200" aria-label="window width, %"></label>
            <label>level <input type="number" data-of="level" min="0" max="100" aria-label="window level, %"></label>
            <button data-whole title="the whole picture, in its own greys">Original</button>
        </div>
        <svg width="0" height="0" aria-hidden="true"><filter id="${id}" color-interpolation-filters="sRGB">
            <feComponentTransfer class="rr-curve">
                <feFuncR type="linear"/><feFuncG type="linear"/><feFuncB type="linear"/>
            </feComponentTransfer></filter></svg>`;
    const OVERLAY = `<span class="rr-left"></span><span class="rr-right"></span>
        <span class="rr-scale"><i></i><b></b></span>`;

    const roundLength = most => {  // 1, 2 or 5 times a power of ten
        const power = 10**Math.floor(Math.log10(most));
        return +([5, 2, 1].find(times => times*power <= most)*power).toPrecision(1);
    };

    const look = (root, tools) => {
        const id = `rr-${Math.random().toString(36).slice(2)}`;
        const held = new Map();  // pointers that are down on the picture, and where each was last
        const now = {...WHOLE};
        let tool = "window", chosen = false, facts = {}, hovers = false, pointer = null, acting = null;
        tools.innerHTML = TOOLS(id);
        const all = part => [...root.querySelectorAll(part)];
        const other = () => tool == "window" ? "move" : "window";

        const showOverlay = stage => {
            const overlay = stage.querySelector(".rr-overlay") ?? stage.appendChild(document.createElement("div"));
            if (!overlay.className) {
                overlay.className = "rr-overlay";
                overlay.setAttribute("aria-hidden", "true");  // the line under the pictures says the same
                overlay.innerHTML = OVERLAY;
            }
            const [left, right, scale] = overlay.children, visible = facts.mm/now.zoom;
            [left.textContent, right.textContent] = facts.sides ?? ["", ""];
            scale.hidden = !facts.mm;
            if (!facts.mm) return;
            const bar = roundLength(visible*0.4);
            scale.firstChild.style.width = `calc(${bar/visible}*(100% + 20px))`;  // 20px: the margins in widget.css
            scale.lastChild.textContent = `${bar} mm ${facts.where}`;
        };

        const show = () => {
            const slope = 100/now.width, intercept = (now.width/2 - now.level)/now.width;
            const plain = facts.grey === false || (now.width == 100 && now.level == 50);
            const range = [100*(1 - now.zoom), 0];
            [now.x, now.y] = [clamp(now.x, range), clamp(now.y, range)];
            for (const part of tools.querySelector(".rr-curve").children) {
                part.setAttribute("slope", slope);
                part.setAttribute("intercept", intercept);
            }
            for (const image of all(".rr-stage img")) {
                image.style.transform = now.zoom == 1 ? "" : `translate(${now.x}%, ${now.y}%) scale(${now.zoom})`;
                image.style.filter = plain ? "" : `url("#${id}")`;
            }
            for (const stage of all(".rr-stage")) {
                stage.dataset.tool = tool;
                stage.toggleAttribute("data-held", chosen || now.zoom > 1);
                stage.style.setProperty("--rr-ratio", facts.ratio ?? 1);
                showOverlay(stage);
            }
            tools.querySelector("output").textContent = `${+now.zoom.toPrecision(2)}×`;
            for (const field of tools.querySelectorAll("input")) {
                if (field != document.activeElement) field.value = Math.round(now[field.dataset.of]);
                field.disabled = facts.grey === false;
            }
            for (const button of tools.querySelectorAll("[data-tool]"))
                button.setAttribute("aria-pressed", button.dataset.tool == tool);
        };

        const change = changes => {
            for (const [name, value] of Object.entries(changes))
                now[name] = LIMITS[name] ? clamp(value, LIMITS[name]) : value;
            show();
        };
        const drag = (what, dx, dy) => change(what == "move" ? {x: now.x + dx, y: now.y + dy}
            : facts.grey === false ? {} : {width: now.width + dx, level: now.level + dy});
        const zoom = (factor, x = 50, y = 50) => {  // about a point of the frame, in %
            const wanted = clamp(now.zoom*factor, LIMITS.zoom), size = wanted < 1.01 ? 1 : wanted, by = size/now.zoom;
            change({zoom: size, x: x - (x - now.x)*by, y: y - (y - now.y)*by});
        };
        const place = (stage, event) => {
            const box = stage.getBoundingClientRect();
            return [100*(event.clientX - box.left)/box.width, 100*(event.clientY - box.top)/box.height];
        };

        const listen = (kind, handle, options) => root.addEventListener(kind, event => {
            const stage = event.target.closest(".rr-stage");
            if (stage) handle(event, stage);
        }, options);
        listen("pointerdown", (event, stage) => {
            if (event.button == 1) return;
            const swaps = event.button == 2 || event.shiftKey;
            const scrolls = event.pointerType == "touch" && !chosen;  // the page, until a tool is chosen
            acting = scrolls ? (now.zoom > 1 ? "move" : null) : swaps ? other() : tool;
            held.set(event.pointerId, place(stage, event));
            stage.setPointerCapture(event.pointerId);
            stage.focus({preventScroll: true});
        });
        listen("pointermove", (event, stage) => {
            const last = held.get(event.pointerId);
            if (!last) return;
            const here = place(stage, event), [dx, dy] = [here[0] - last[0], here[1] - last[1]];
            const apart = (a, b) => Math.max(1, Math.hypot(a[0] - b[0], a[1] - b[1]));
            for (const [id, there] of held) {
                if (id == event.pointerId) continue;
                acting = "move";
                zoom(apart(here, there)/apart(last, there), (here[0] + there[0])/2, (here[1] + there[1])/2);
            }
            held.set(event.pointerId, here);
            if (acting) drag(acting, dx/held.size, dy/held.size);
        });
        for (const kind of ["pointerup", "pointercancel"]) listen(kind, event => held.delete(event.pointerId));
        listen("dragstart", event => event.preventDefault());
        listen("contextmenu", event => {
            if (event.button != 2) return;
            event.preventDefault();
            event.stopPropagation();
        });
        const track = event => {  // did the hand bring the pointer here, or the page move below it?
            if (!root.isConnected) return document.removeEventListener("pointermove", track, true);
            const moved = event.screenX != pointer?.[0] || event.screenY != pointer?.[1];
            const over = root.contains(event.target) && event.target.closest(".rr-stage");
            hovers = !!over && (hovers || moved);
            pointer = [event.screenX, event.screenY];
        };
        for (const kind of ["pointerover", "focusin"])
            root.addEventListener(kind, () => document.addEventListener("pointermove", track, true));
        document.addEventListener("pointermove", track, true);
        listen("wheel", (event, stage) => {
            const factor = Math.exp(-event.deltaY*(event.deltaMode ? 16 : 1)*0.0015);
            const scrolls = !hovers && document.activeElement != stage;
            if (!event.ctrlKey && (scrolls || (factor < 1 && now.zoom == 1))) return;
            event.preventDefault();
            zoom(factor, ...place(stage, event));
        }, {passive: false});

        const ARROWS = {ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP]};
        listen("keydown", event => {
            if (event.ctrlKey || event.metaKey || event.altKey) return;
            const by = {"+": 1.25, "=": 1.25, "-": 0.8, "−": 0.8}[event.key], arrow = ARROWS[event.key];
            if (by) zoom(by);
            else if (arrow) drag(event.shiftKey ? other() : tool, ...arrow);
            else if (event.key == "0") change(WHOLE);
            else return;
            event.preventDefault();
            event.stopPropagation();
        });
        tools.addEventListener("click", event => {
            const button = event.target.closest("button");
            if (!button) return;
            if (button.dataset.tool) [tool, chosen] = [button.dataset.tool, true];
            if (button.dataset.by) zoom(+button.dataset.by);
            if ("whole" in button.dataset) change(WHOLE);
            show();
        });
        tools.addEventListener("change", event => {
            if (event.target.value) change({[event.target.dataset.of]: +event.target.value});
            event.target.value = Math.round(now[event.target.dataset.of]);
        });

        const refresh = () => {  // what the kernel has changed
            facts = JSON.parse(root.querySelector("[data-facts]")?.dataset.facts ?? "{}");
            for (const dot of all("[data-names]"))
                for (const [part, name] of JSON.parse(dot.dataset.names))
                    dot.closest(".rr-named")?.querySelectorAll(part).forEach(e => e.setAttribute("aria-label", name));
            for (const stage of all(".rr-stage")) {
                stage.tabIndex = 0;
                stage.setAttribute("role", "group");
                stage.setAttribute("aria-label", HELP);
            }
            // JupyterLab would take arrow keys for its own
            for (const own of all(".rr-stage, [role=slider]")) own.dataset.lmSuppressShortcuts = "true";
            for (const button of all(".widget-toggle-button"))
                button.setAttribute("aria-pressed", button.classList.contains("mod-active"));
            show();
        };
        const watcher = new MutationObserver(() => { refresh(); watcher.takeRecords(); });
        refresh();
        watcher.observe(root, {childList: true, subtree: true, attributes: true, attributeFilter: ["class"]});
        return watcher;
    };

    let tries = 0;
    const begin = () => {
        const root = dot.closest(".radrotator"), tools = root?.querySelector(".rr-tools");
        if (tools?.isConnected) root.look ??= look(root, tools);
        else if (tries++ < 1200) setTimeout(begin, 50);
    };
    begin();
})
