// The page's part of Delta Sampling: tooltips, the lambda slider's end, LoRA rows and cards, and requests for a new
// drawing, rows and status when the page shows old ones.
(() => {
    const TABS = ["txt2img", "img2img"];
    const CURVE_ITEMS = ["strength", "start", "end", "curve", "first", "last"];
    const SLIDER_END = 5;
    const TOAST_MS = 3000;

    const elementOf = (tab, item) => gradioApp().querySelector(`#script_${tab}_delta_sampling_${item}`);

    // Returns a function that calls `action` once, `ms` after the last of several calls.
    function debounced(action, ms) {
        let timer;
        return () => {
            clearTimeout(timer);
            timer = setTimeout(action, ms);
        };
    }

    // Writes a value as a user does, so that the widget notices it.
    function enter(input, value) {
        input.value = value;
        input.dispatchEvent(new Event("input", {bubbles: true}));
    }

    // The accordion carries the tooltips of its elements by their names.
    function addTooltips(tab) {
        const carrier = elementOf(tab, "settings")?.querySelector("[data-tooltips]");
        if (!carrier) return;
        for (const [item, text] of Object.entries(JSON.parse(carrier.dataset.tooltips))) {
            const element = elementOf(tab, item);
            if (element) element.title = (window.getTranslation && window.getTranslation(text)) || text;
        }
    }

    // The WebUI gives each "None" on the page the tooltip of its list of scripts, which is wrong in the accordion.
    function clearForeignTooltips(tab) {
        const settings = elementOf(tab, "settings");
        if (!settings) return;
        new MutationObserver((changes) => {
            for (const {target} of changes) {
                if (target.title && !target.id.startsWith(`script_${tab}_delta_sampling_`)) target.title = "";
            }
        }).observe(settings, {attributes: true, attributeFilter: ["title"], subtree: true});
    }

    // The widget's maximum limits typed numbers; the slider covers only the usual part of the range.
    function shortenSlider(tab) {
        const range = elementOf(tab, "strength")?.querySelector("input[type=range]");
        if (!range) return;
        range.max = Math.min(SLIDER_END, Number(range.max));
        const number = elementOf(tab, "strength").querySelector("input[type=number]");
        enter(number, number.value);
    }

    // Clicks `refresh` if `display` shows another value than the latest: answers to quick changes can arrive in any
    // order.  `latestValue` returns JSON, or null while the user chooses; `onShown` gets each value that is shown.
    function keepInSync({display, refresh, latestValue, onShown}) {
        if (!display || !refresh) return;
        let lastRequest;
        const check = () => {
            const shown = display.querySelector("[data-drawn]")?.dataset.drawn;
            if (!shown) return;
            onShown(shown);
            const latest = latestValue();
            const request = latest + shown;
            if (latest === null || JSON.stringify(JSON.parse(shown)) === latest || request === lastRequest) return;
            lastRequest = request; // once, since the page's widgets can be late themselves
            refresh.click();
        };
        const checkSoon = debounced(check, 400);
        new MutationObserver(checkSoon).observe(display, {childList: true, subtree: true});
        checkSoon();
    }

    // Returns the curve's values as the widgets show them, in the order of the drawing's data-drawn.
    function curveValues(tab) {
        return CURVE_ITEMS.map((item) => {
            const text = elementOf(tab, item).querySelector("input").value;
            return item === "curve" ? text : text === "" ? null : Number(text);
        });
    }

    // Disables the curve's start and end, which a constant curve ignores.
    function disableCurveEnds(tab, shown) {
        const constant = JSON.parse(shown)[CURVE_ITEMS.indexOf("curve")] === "constant";
        for (const item of ["first", "last"]) {
            const widget = elementOf(tab, item);
            widget?.classList.toggle("delta-sampling-inactive", constant);
            widget?.querySelectorAll("input").forEach((input) => { input.disabled = constant; });
        }
    }

    function syncDrawing(tab) {
        keepInSync({
            display: elementOf(tab, "drawing"),
            refresh: elementOf(tab, "redraw"),
            latestValue: () => {
                const choosing = elementOf(tab, "curve").contains(document.activeElement);
                return choosing ? null : JSON.stringify(curveValues(tab));
            },
            onShown: (shown) => disableCurveEnds(tab, shown),
        });
    }

    // Sends an edit of the LoRAs to Python, which parses and writes their text.
    let edits = 0;

    function sendEdit(tab, edit) {
        edits += 1; // makes two equal edits differ
        enter(elementOf(tab, "edit").querySelector("textarea, input"), JSON.stringify({...edit, number: edits}));
        elementOf(tab, "apply_edit").click();
    }

    // Each LoRA has a row.  Its slider and number move together; the change takes effect on release.
    function connectRows(tab) {
        const rows = elementOf(tab, "picked");
        if (!rows) return;
        const loraOf = (element) => {
            const {index, name} = element.closest(".delta-sampling-pick").dataset;
            return {index: Number(index), name};
        };
        let focused = ""; // the selector of the input that the user changes
        rows.addEventListener("input", ({target}) => {
            if (target.type !== "range") return;
            target.closest(".delta-sampling-pick").querySelector("[type=number]").value = target.value;
        });
        rows.addEventListener("change", ({target}) => {
            if (target.value === "") return;
            const lora = loraOf(target);
            focused = `[data-index="${lora.index}"] [type=${target.type}]`;
            sendEdit(tab, {do: "weight", ...lora, weight: Number(target.value)});
        });
        rows.addEventListener("click", ({target}) => {
            const button = target.closest("[data-do]");
            if (button) sendEdit(tab, {do: button.dataset.do, ...loraOf(button)});
        });
        // New rows replace the input that has the focus: the same input of the new row gets it.
        new MutationObserver(() => {
            if (focused && document.activeElement === document.body) rows.querySelector(focused)?.focus();
        }).observe(rows, {childList: true, subtree: true});
        document.addEventListener("focusin", ({target}) => {
            if (!rows.contains(target)) focused = "";
        });
        syncRows(tab, rows);
    }

    function syncRows(tab, rows) {
        keepInSync({
            display: rows,
            refresh: elementOf(tab, "redraw_picked"),
            latestValue: () => JSON.stringify(elementOf(tab, "loras").querySelector("textarea, input").value),
            onShown: (shown) => showToast(tab, shown),
        });
    }

    // By tab: the LoRAs shown when a card was clicked.
    const lorasBeforeClick = {};

    // Shows the LoRAs for a moment after a click on a card, since the Lora tab hides the accordion.
    function showToast(tab, shown) {
        const before = lorasBeforeClick[tab];
        if (before === undefined || shown === before) return;
        delete lorasBeforeClick[tab];
        const toast = document.createElement("div");
        toast.className = "delta-sampling-note";
        toast.textContent = `Delta Sampling: ${JSON.parse(shown) || "no LoRA"}`;
        document.body.append(toast);
        setTimeout(() => toast.remove(), TOAST_MS);
    }

    function takesCards(tab) {
        const open = elementOf(tab, "enabled")?.querySelector(".label-wrap")?.classList.contains("open");
        return open && elementOf(tab, "cards")?.querySelector("input")?.checked;
    }

    // Wraps the WebUI's function that cards call by its name.
    function connectCards() {
        const addToPrompt = window.cardClicked;
        if (!addToPrompt) return;
        window.cardClicked = (tab, text, ...rest) => {
            if (!/<(lora|lyco):/.test(text) || !takesCards(tab)) {
                addToPrompt(tab, text, ...rest);
                return;
            }
            lorasBeforeClick[tab] = elementOf(tab, "picked").querySelector("[data-drawn]")?.dataset.drawn;
            sendEdit(tab, {do: "card", text});
        };
    }

    // The WebUI writes the log below the gallery at the end of each generation, even of a failed one.
    function refreshStatusAfterRuns(tab) {
        const log = gradioApp().querySelector(`#html_log_${tab}`);
        const refresh = elementOf(tab, "refresh_status");
        if (!log || !refresh) return;
        const refreshSoon = debounced(() => refresh.click(), 300);
        new MutationObserver(refreshSoon).observe(log, {childList: true, subtree: true, characterData: true});
    }

    onUiLoaded(() => {
        for (const tab of TABS) {
            clearForeignTooltips(tab);
            addTooltips(tab);
            shortenSlider(tab);
            syncDrawing(tab);
            connectRows(tab);
            refreshStatusAfterRuns(tab);
            elementOf(tab, "default_preset")?.click();
        }
        connectCards();
    });
})();
