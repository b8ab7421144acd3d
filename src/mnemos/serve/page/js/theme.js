// Loaded before anything is drawn, so that a dark page never flashes white.
"use strict";
{
  const chosen = localStorage.getItem("mnemos.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
}
