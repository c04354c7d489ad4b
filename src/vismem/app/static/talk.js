// Sends clicks in the conversation to Python; arrow keys move from chip to chip.
element.addEventListener('click', (event) => {
  const at = event.target.closest('button');
  if (!at) return;
  if (at.dataset.index !== undefined) {
    const { turn, side, index } = at.dataset;
    window.vismemChip = { turn, side, index };
    trigger('inspect', { turn, side, index, closes: true });
  } else if (at.dataset.example !== undefined) trigger('example', { example: at.dataset.example });
  else if (at.dataset.ask !== undefined) trigger('follow', { question: at.dataset.ask });
  else if (at.dataset.do === 'dismiss') trigger('dismiss', {});
});
element.addEventListener('keydown', (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const at = event.target.closest('.vm-chip');
  if (!step || !at || event.altKey || event.ctrlKey || event.metaKey) return;
  const strip = at.classList.contains('vm-mark');
  const all = [...document.querySelectorAll('#ui-past .vm-chip, #ui-live .vm-chip')]
    .filter((each) => each.classList.contains('vm-mark') === strip);
  const next = all[all.indexOf(at) + step];
  if (next) {
    next.focus();
    event.preventDefault();
  }
});
// Empties the box once its question was accepted. Python does so too, but gradio ignores an update that arrives while
// a key event in the focused box is being handled.
let taken = '';
const empty = (turn) => {
  const name = turn?.getAttribute('aria-label') ?? '';
  if (name === taken) return;
  taken = name;
  const box = document.querySelector('#ui-composer textarea');
  if (!box?.value || box.value.trim() !== turn?.querySelector('.ui-ask')?.textContent.trim()) return;
  box.value = '';
  box.dispatchEvent(new Event('input', { bubbles: true }));
};
// Keeps the last line of a running answer above the question box; on a low screen, where the box is at the end of the
// page, in the viewport.
let writing = false;
watch('value', () => {
  const turn = element.closest('#ui-live')?.querySelector('.ui-turn');
  const busy = Boolean(turn?.querySelector('[aria-busy]'));
  const end = Math.min(document.querySelector('#ui-dock').getBoundingClientRect().top, window.innerHeight);
  const over = turn ? turn.getBoundingClientRect().bottom - end : 0;
  if ((busy || writing) && over > 0) window.scrollBy(0, over);
  writing = busy;
  empty(turn);
});
