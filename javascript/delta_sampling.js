// The page's part of Delta Sampling: tooltips, a slider that ends before its number box does, and a fresh status.

const deltaSamplingTips = {
    strength: "How strongly the delta is added at each step. 0 adds nothing, 1 the difference as it is; up to 10 can be typed.",
    start: "Where in the run the delta starts: 0 is the first step.",
    end: "Where in the run the delta ends: 1 is the last step.",
    curve: "How lambda changes from start to end of its range. The constant curve ignores curve start and curve end.",
    first: "Share of lambda at the start of the range.",
    last: "Share of lambda at the end of the range.",
    base: "The SD 1.x checkpoint that LoRAs and adapted checkpoint were made for. None: the default of the settings page.",
    adapted: "A fine-tuned checkpoint whose difference from the base is added. None: the base itself, changed by the LoRAs alone.",
    loras: "LoRAs or LyCORIS networks with their weights, as in: moxin:0.8, lineart:1:te=0.5 (te: weight for the text encoder). Tags such as <lora:moxin:0.8> are understood.",
    add_lora: "The LoRA chosen here joins the list with the weight that is noted on its card, or 1.",
    prompt: "What the side model is told. Empty: the main prompt without its extra-network tags.",
    negative_prompt: "What the side model is told to avoid. Empty: the main negative prompt.",
    adapted_prompt: "A prompt for the adapted model alone; the difference between two prompts can be the delta, too.",
    quality: "How often the side model is asked: always, every 2nd step, every 4th step. In between, its delta is held.",
    hires: "In which passes of hires fix the delta is added.",
    refresh_status: "Show what is loaded now.",
    unload: "Give the memory of the side models back. The next generation loads them again.",
};

const deltaSamplingSliderEnd = 5;

function deltaSamplingElement(tab, item) {
    return gradioApp().querySelector(`#script_${tab}_delta_sampling_${item}`);
}

function deltaSamplingTooltips(tab) {
    const translated = (text) => (window.getTranslation && window.getTranslation(text)) || text;
    for (const [item, tip] of Object.entries(deltaSamplingTips)) {
        const element = deltaSamplingElement(tab, item);
        if (element) element.title = translated(tip);
    }
}

// The widget's maximum is what may be typed; the slider itself covers the part of it that is usual.
function deltaSamplingSlider(tab) {
    const range = deltaSamplingElement(tab, "strength")?.querySelector("input[type=range]");
    if (!range) return;
    range.max = Math.min(deltaSamplingSliderEnd, Number(range.max));
    const number = deltaSamplingElement(tab, "strength").querySelector("input[type=number]");
    number.dispatchEvent(new Event("input", {bubbles: true}));
}

// Values as the widgets show them, in the order in which the drawing tells what it shows.
function deltaSamplingShown(tab) {
    return ["strength", "start", "end", "curve", "first", "last"].map((item) => {
        const text = deltaSamplingElement(tab, item).querySelector("input").value;
        return item === "curve" ? text : text === "" ? null : Number(text);
    });
}

// The constant curve has no start and end of its own.
function deltaSamplingCurve(tab, drawn) {
    const constant = drawn !== undefined && JSON.parse(drawn)[3] === "constant";
    for (const item of ["first", "last"]) {
        deltaSamplingElement(tab, item)?.classList.toggle("delta-sampling-inactive", constant);
    }
}

// Answers to quick changes can arrive in another order: a drawing that is not of the latest values is asked for again.
function deltaSamplingDrawing(tab) {
    const drawing = deltaSamplingElement(tab, "drawing");
    const redraw = deltaSamplingElement(tab, "redraw");
    if (!drawing || !redraw) return;
    let waiting, asked;
    const check = () => {
        const drawn = drawing.querySelector("[data-drawn]")?.dataset.drawn;
        deltaSamplingCurve(tab, drawn);
        const choosing = deltaSamplingElement(tab, "curve").contains(document.activeElement);
        if (!drawn || choosing) return;
        const shown = JSON.stringify(deltaSamplingShown(tab));
        const difference = shown + drawn;
        if (JSON.stringify(JSON.parse(drawn)) === shown || difference === asked) return;
        asked = difference; // once: what the page shows can itself be late
        redraw.click();
    };
    const checkSoon = () => {
        clearTimeout(waiting);
        waiting = setTimeout(check, 400);
    };
    new MutationObserver(checkSoon).observe(drawing, {childList: true, subtree: true});
    checkSoon();
}

// The log below the gallery is written at the end of each generation, failed and plain ones included.
function deltaSamplingStatus(tab) {
    const log = gradioApp().querySelector(`#html_log_${tab}`);
    const refresh = deltaSamplingElement(tab, "refresh_status");
    if (!log || !refresh) return;
    let waiting;
    new MutationObserver(() => {
        clearTimeout(waiting);
        waiting = setTimeout(() => refresh.click(), 300);
    }).observe(log, {childList: true, subtree: true, characterData: true});
}

// The WebUI explains every "None" on the page as that of its own list of scripts; here it means something else.
function deltaSamplingOwnTips(tab) {
    const settings = deltaSamplingElement(tab, "settings");
    settings?.addEventListener("mouseover", (event) => {
        for (let node = event.target; node && node !== settings; node = node.parentElement) {
            if (node.title && !node.id.startsWith(`script_${tab}_delta_sampling_`)) node.title = "";
        }
    }, true);
}

onUiLoaded(() => {
    for (const tab of ["txt2img", "img2img"]) {
        deltaSamplingTooltips(tab);
        deltaSamplingSlider(tab);
        deltaSamplingDrawing(tab);
        deltaSamplingStatus(tab);
        deltaSamplingOwnTips(tab);
    }
});
