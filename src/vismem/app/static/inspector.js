// The open panel: takes the focus when it opens, returns it to its chip on Escape or Close.
const still = () => window.matchMedia('(prefers-reduced-motion: reduce)').matches;
const back = () => {
  const from = window.vismemChip;
  if (!from) return;
  const chip = document.querySelector(
    `.vm-answer .vm-chip[data-turn="${from.turn}"][data-side="${from.side}"][data-index="${from.index}"]`);
  if (chip) chip.focus();
};
const close = () => {
  back();
  trigger('closing', {});
};
element.addEventListener('click', (event) => {
  const at = event.target.closest('button');
  if (!at || at.disabled) return;
  if (at.dataset.do === 'close') close();
  else if (at.dataset.index !== undefined) {
    const { turn, side, index } = at.dataset;
    window.vismemChip = { turn, side, index };
    trigger('inspect', { turn, side, index, closes: false });
  }
});
document.addEventListener('keydown', (event) => {
  if (event.key === 'Escape' && element.querySelector('.ui-inspector')) close();
});
let shown = null;
watch('value', () => {
  const panel = element.querySelector('.vm-panel');
  const before = shown;
  shown = panel?.id ?? null;
  if (!panel || shown === before) return; // rendered again: keep the scroll position
  const stepping = element.contains(document.activeElement) && document.activeElement.closest('.ui-steps');
  if (!stepping || document.activeElement.disabled) panel.focus({ preventScroll: true });
  if (window.matchMedia('(max-width: 68rem)').matches) {
    element.scrollIntoView({ block: 'start', behavior: still() ? 'auto' : 'smooth' });
  } else element.closest('#ui-right').scrollTo(0, 0);
});
