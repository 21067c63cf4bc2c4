// The page's part of Delta Sampling: tooltips, a slider that ends before its number box does, the rows of the LoRAs,
// clicks on their cards, and what is fresh: drawing, rows and status.

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
    cards: "While the accordion is open, a click on a card of the Lora tab puts that LoRA here, and not into the main prompt; a second click takes it out.",
    preset: "Settings of this accordion that were saved under a name: choose one to load it.",
    delete_preset: "Delete the preset that is chosen",
    preset_name: "A name for what the accordion holds now; that of a preset replaces it.",
    save_preset: "Save the settings under this name",
    prompt: "What the side model is told. Empty: the main prompt without its extra-network tags, for which {prompt} stands.",
    negative_prompt: "What the side model is told to avoid. Empty: the main negative prompt, for which {prompt} stands.",
    adapted_prompt: "A prompt for the adapted model alone; the difference between two prompts can be the delta, too.",
    quality: "How often the side model is asked: always, every 2nd step, every 4th step. In between, its delta is held.",
    hires: "In which passes of hires fix the delta is added.",
    refresh_status: "Show what is loaded now.",
    unload: "Give the memory of the side models back. The next generation loads them again.",
};

const deltaSamplingUnitTips = {
    image: "What the model looks at: a map, a picture that a preprocessor makes one of, or a picture that an IP-Adapter prompts with. In img2img without one: img2img's own picture.",
    images: "An IP-Adapter sees them together with the first; maps go to the images of a batch, one by one.",
    pixel_perfect: "Make the map at the size that the side model works at, and anew for the pass of hires fix.",
    preview: "Show what the preprocessor makes of the first picture.",
    model: "A ControlNet, Control-LoRA, T2I-Adapter or IP-Adapter made for the base checkpoint's family.",
    preprocessor: "What makes the map. None: the picture is a map already, or is for an IP-Adapter.",
    weight: "How strongly the model steers. 0 adds nothing.",
    start: "Where in the run it starts to count: 0 is the first step.",
    end: "Where in the run it ceases to count: 1 is the last step.",
    mode: "Which is more important. Prompt and control weaken each layer a little; control leaves the negative prompt alone as well, so that it counts for more.",
    resize: "What becomes of a map whose proportions are not those of the picture.",
    resolution: "The shorter side of the map, in pixels.",
    threshold_a: "The preprocessor's first number; of canny, edges below it are left out.",
    threshold_b: "The preprocessor's second number; of canny, edges above it are always there.",
    weight_type: "How an IP-Adapter's weight is spread over the layers of the model.",
};

const deltaSamplingSliderEnd = 5;

function deltaSamplingElement(tab, item) {
    return gradioApp().querySelector(`#script_${tab}_delta_sampling_${item}`);
}

function deltaSamplingTooltips(tab) {
    const translated = (text) => (window.getTranslation && window.getTranslation(text)) || text;
    const explain = (tips, prefix) => {
        for (const [item, tip] of Object.entries(tips)) {
            const element = deltaSamplingElement(tab, prefix + item);
            if (element) element.title = translated(tip);
        }
    };
    explain(deltaSamplingTips, "");
    for (let unit = 1; deltaSamplingElement(tab, `unit${unit}_image`); unit++) {
        explain(deltaSamplingUnitTips, `unit${unit}_`);
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
    const constant = JSON.parse(drawn)[3] === "constant";
    for (const item of ["first", "last"]) {
        const widget = deltaSamplingElement(tab, item);
        widget?.classList.toggle("delta-sampling-inactive", constant);
        widget?.querySelectorAll("input").forEach((input) => { input.disabled = constant; });
    }
}

// Answers to quick changes can arrive in another order: what is not drawn of the latest values is asked for again.
// `shown` gives these, null while somebody chooses; `follow` is told of everything that arrives.
function deltaSamplingKeepInSync(drawing, redraw, shown, follow) {
    if (!drawing || !redraw) return;
    let waiting, asked;
    const check = () => {
        const drawn = drawing.querySelector("[data-drawn]")?.dataset.drawn;
        if (!drawn) return;
        follow(drawn);
        const wanted = shown();
        if (wanted === null || JSON.stringify(JSON.parse(drawn)) === wanted || wanted + drawn === asked) return;
        asked = wanted + drawn; // once: what the page shows can itself be late
        redraw.click();
    };
    const checkSoon = () => {
        clearTimeout(waiting);
        waiting = setTimeout(check, 400);
    };
    new MutationObserver(checkSoon).observe(drawing, {childList: true, subtree: true});
    checkSoon();
}

function deltaSamplingDrawing(tab) {
    const latest = () => {
        const choosing = deltaSamplingElement(tab, "curve").contains(document.activeElement);
        return choosing ? null : JSON.stringify(deltaSamplingShown(tab));
    };
    const [drawing, redraw] = ["drawing", "redraw"].map((item) => deltaSamplingElement(tab, item));
    deltaSamplingKeepInSync(drawing, redraw, latest, (drawn) => deltaSamplingCurve(tab, drawn));
}

// What is done with a row or a card goes to Python, which knows how the list of LoRAs is written.
let deltaSamplingEdits = 0;

function deltaSamplingEdit(tab, edit) {
    const box = deltaSamplingElement(tab, "edit").querySelector("textarea, input");
    deltaSamplingEdits += 1;
    box.value = JSON.stringify({...edit, number: deltaSamplingEdits});
    box.dispatchEvent(new Event("input", {bubbles: true}));
    deltaSamplingElement(tab, "apply_edit").click();
}

// A row for each LoRA: its slider and its number move together, and count when they are let go.
function deltaSamplingRows(tab) {
    const rows = deltaSamplingElement(tab, "picked");
    if (!rows) return;
    let focused = "";
    const told = (element) => {
        const {index, name} = element.closest(".delta-sampling-pick").dataset;
        return {index: Number(index), name};
    };
    rows.addEventListener("input", ({target}) => {
        if (target.type !== "range") return;
        target.closest(".delta-sampling-pick").querySelector("[type=number]").value = target.value;
    });
    rows.addEventListener("change", ({target}) => {
        if (target.value === "") return;
        focused = `[data-index="${told(target).index}"] [type=${target.type}]`;
        deltaSamplingEdit(tab, {do: "weight", ...told(target), weight: Number(target.value)});
    });
    rows.addEventListener("click", ({target}) => {
        const button = target.closest("[data-do]");
        if (button) deltaSamplingEdit(tab, {do: button.dataset.do, ...told(button)});
    });
    const latest = () => JSON.stringify(deltaSamplingElement(tab, "loras").querySelector("textarea, input").value);
    const redraw = deltaSamplingElement(tab, "redraw_picked");
    deltaSamplingKeepInSync(rows, redraw, latest, (drawn) => deltaSamplingShowToast(tab, drawn));
    // Who moves a slider by keys goes on with the row that has taken its place.
    new MutationObserver(() => {
        if (focused && document.activeElement === document.body) rows.querySelector(focused)?.focus();
    }).observe(rows, {childList: true, subtree: true});
    document.addEventListener("focusin", ({target}) => {
        if (!rows.contains(target)) focused = "";
    });
}

// The list is out of sight while cards are clicked, so what it has become then is said for a moment.
const deltaSamplingClicked = {};

function deltaSamplingShowToast(tab, drawn) {
    const before = deltaSamplingClicked[tab];
    if (before === undefined || drawn === before) return;
    delete deltaSamplingClicked[tab];
    const note = document.createElement("div");
    note.className = "delta-sampling-note";
    note.textContent = `Delta Sampling: ${JSON.parse(drawn) || "no LoRA"}`;
    document.body.append(note);
    setTimeout(() => note.remove(), 3000);
}

function deltaSamplingTakesCards(tab) {
    const open = deltaSamplingElement(tab, "enabled")?.querySelector(".label-wrap")?.classList.contains("open");
    return open && deltaSamplingElement(tab, "cards")?.querySelector("input")?.checked;
}

// Cards call this function of the WebUI by its name.
function deltaSamplingCards() {
    const intoPrompt = window.cardClicked;
    if (!intoPrompt) return;
    window.cardClicked = (tab, text, ...rest) => {
        if (!/<(lora|lyco):/.test(text) || !deltaSamplingTakesCards(tab)) {
            intoPrompt(tab, text, ...rest);
            return;
        }
        deltaSamplingClicked[tab] = deltaSamplingElement(tab, "picked").querySelector("[data-drawn]")?.dataset.drawn;
        deltaSamplingEdit(tab, {do: "card", text});
    };
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
function deltaSamplingClearForeignTooltips(tab) {
    const settings = deltaSamplingElement(tab, "settings");
    if (!settings) return;
    new MutationObserver((changes) => {
        for (const {target} of changes) {
            if (target.title && !target.id.startsWith(`script_${tab}_delta_sampling_`)) target.title = "";
        }
    }).observe(settings, {attributes: true, attributeFilter: ["title"], subtree: true});
}

onUiLoaded(() => {
    for (const tab of ["txt2img", "img2img"]) {
        deltaSamplingClearForeignTooltips(tab);
        deltaSamplingTooltips(tab);
        deltaSamplingSlider(tab);
        deltaSamplingDrawing(tab);
        deltaSamplingRows(tab);
        deltaSamplingStatus(tab);
        deltaSamplingElement(tab, "default_preset")?.click();
    }
    deltaSamplingCards();
});
