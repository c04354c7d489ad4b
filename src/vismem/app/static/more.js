// The settings few need are shown and hidden; `page.css` looks at what the button says of itself.
const settings = element.closest('#ui-settings');
const dock = element.closest('#ui-dock');
element.addEventListener('click', (event) => {
  const at = event.target.closest('button');
  if (!at) return;
  at.setAttribute('aria-expanded', String(at.getAttribute('aria-expanded') !== 'true'));
  settings.scrollTo(0, settings.scrollHeight); // they are its last
  if (getComputedStyle(dock).position === 'static') dock.scrollIntoView({ block: 'end' });
});
dock.addEventListener('change', (event) => {
  if (event.target.closest('#ui-invocation')) settings.scrollTo(0, 0); // what a choice needs is its first
});
// A row of choices is one group, with one place in the order of Tab: gradio names each of its inputs apart, and again
// whenever it is chosen.
const group = () => {
  for (const input of dock.querySelectorAll('fieldset[id] input[type="radio"]')) {
    const row = input.closest('fieldset');
    if (input.name !== row.id) input.name = row.id;
    if (row.role === 'radiogroup') continue;
    row.role = 'radiogroup';
    row.ariaLabel = row.querySelector('[data-testid="block-info"]').textContent;
  }
};
new MutationObserver(group).observe(dock, { attributeFilter: ['name'], childList: true, subtree: true });
group();
