// New conversation; light or dark, remembered if the browser allows storage.
const KEY = 'vismem-theme';
const kept = (value) => {
  try {
    if (value) localStorage.setItem(KEY, value);
    return localStorage.getItem(KEY);
  } catch { return null; }
};
const wear = (value) => document.body.classList.toggle('dark', value === 'dark');
if (kept() && !new URLSearchParams(location.search).has('__theme')) wear(kept());
element.addEventListener('click', (event) => {
  const at = event.target.closest('[data-do]');
  if (!at) return;
  if (at.dataset.do === 'renew') trigger('renew', {});
  if (at.dataset.do === 'theme') wear(kept(document.body.classList.contains('dark') ? 'light' : 'dark')
    ?? (document.body.classList.contains('dark') ? 'light' : 'dark'));
});
