// The widgets' html-manager asks for MathJax 2's queue; MathJax 3, which sets the formulas of pages that have any, has
// none. Merged into the page's MathJax settings, never put in their place; needed before MathJax 3 starts, and after.
const queue = { Queue() {} };
window.MathJax = Object.assign(window.MathJax || {}, {
  Hub: queue,
  startup: {
    ready() {
      MathJax.Hub = queue;
      MathJax.startup.defaultReady();
    },
  },
});
