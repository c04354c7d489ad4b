// The settings few need are shown and hidden; `page.css` looks at what the button says of itself.
element.addEventListener('click', (event) => {
  const at = event.target.closest('button');
  if (at) at.setAttribute('aria-expanded', String(at.getAttribute('aria-expanded') !== 'true'));
});
