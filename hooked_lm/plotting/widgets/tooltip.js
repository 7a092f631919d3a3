// Shows what `data-tip` of an element says, beside it, while it is pointed at or has the keyboard.
(() => {
  const tip = document.getElementById("tip");
  const show = (element) => {
    tip.textContent = element.dataset.tip;
    tip.style.left = tip.style.top = "0";
    // A token that goes over two lines has two boxes; the first is where it begins.
    const box = element.getClientRects()[0];
    const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
    const below = box.bottom + 6 + tip.offsetHeight <= document.documentElement.clientHeight;
    const top = below || box.top < tip.offsetHeight + 6 ? box.bottom + 6 : box.top - 6 - tip.offsetHeight;
    tip.style.left = Math.max(left, 8) + window.scrollX + "px";
    tip.style.top = top + window.scrollY + "px";
    tip.style.visibility = "visible";
  };
  const hide = () => { tip.style.visibility = "hidden"; };
  const told = (event) => event.target.closest("[data-tip]");
  for (const kind of ["mouseover", "focusin"]) {
    document.addEventListener(kind, (event) => { told(event) ? show(told(event)) : hide(); });
  }
  for (const kind of ["mouseleave", "focusout"]) document.documentElement.addEventListener(kind, hide);
})();
