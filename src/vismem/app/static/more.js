// Shows and hides the advanced settings; `page.css` reads the button's aria-expanded.
const settings = element.closest('#ui-settings');
const dock = element.closest('#ui-dock');
element.addEventListener('click', (event) => {
  const at = event.target.closest('button');
  if (!at) return;
  at.setAttribute('aria-expanded', String(at.getAttribute('aria-expanded') !== 'true'));
  settings.scrollTo(0, settings.scrollHeight); // they are at its end
  if (getComputedStyle(dock).position === 'static') dock.scrollIntoView({ block: 'end' });
});
dock.addEventListener('change', (event) => {
  if (event.target.closest('#ui-invocation')) settings.scrollTo(0, 0); // the chosen policy's settings are at its start
});
// Makes each row of choices one radio group, with one tab stop: gradio gives every input its own name, again on each
// change.
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
