"use strict";
const detail = document.getElementById("detail");
const show = (event) => {
  const token = event.target.closest(".t");
  if (token) detail.textContent = token.title;
};
for (const kind of ["pointerover", "focusin", "click"]) document.addEventListener(kind, show);
