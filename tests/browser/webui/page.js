// The functions that the WebUI's page script offers to extensions, and InputAccordion's two synchronized parts.
const uiLoadedCallbacks = [];

function gradioApp() {
    return document;
}

function onUiLoaded(callback) {
    uiLoadedCallbacks.push(callback);
}

// Called by a card of the Lora tab: adds its text to the prompt, or removes it.
function cardClicked(tab, text, negative, allowNegative) {
    const prompt = document.querySelector(`#${tab}_prompt textarea`);
    const joined = ` ${text}`;
    prompt.value = prompt.value.includes(joined) ? prompt.value.replace(joined, "") : prompt.value + joined;
    prompt.dispatchEvent(new Event("input", {bubbles: true}));
}

function standInFollow(id, on) {
    const block = document.getElementById(id);
    block.standInVisible.checked = on;
    if (block.querySelector(".label-wrap").classList.contains("open") !== on) block.querySelector(".label-wrap").click();
}

function standInAccordion(block) {
    const header = block.querySelector(".label-wrap");
    const hidden = document.querySelector(`#${block.id}-checkbox input`);
    const visible = document.createElement("input");
    const update = () => {
        if (hidden.checked === visible.checked) return;
        hidden.checked = visible.checked;
        hidden.dispatchEvent(new Event("input", {bubbles: true}));
        hidden.dispatchEvent(new Event("change", {bubbles: true}));
    };
    visible.type = "checkbox";
    visible.className = hidden.className;
    visible.id = `${block.id}-visible-checkbox`;
    visible.addEventListener("click", (event) => event.stopPropagation());
    visible.addEventListener("input", update);
    block.standInVisible = visible;
    header.querySelector("span").prepend(visible);
    new MutationObserver(() => {
        visible.checked = header.classList.contains("open");
        update();
    }).observe(header, {attributes: true, attributeFilter: ["class"]});
}

document.addEventListener("DOMContentLoaded", () => {
    const observer = new MutationObserver(() => {
        if (!document.querySelector("#txt2img_prompt textarea")) return;
        observer.disconnect();
        document.querySelectorAll(".input-accordion").forEach(standInAccordion);
        uiLoadedCallbacks.forEach((callback) => callback());
    });
    observer.observe(document, {childList: true, subtree: true});
});
