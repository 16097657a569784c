// The widgets' html-manager asks for MathJax 2's queue; MathJax 3, which sets the page's formulas, has none.
// Merged into the page's MathJax settings, never put in their place.
window.MathJax = Object.assign(window.MathJax || {}, {
  startup: {
    ready() {
      MathJax.Hub = { Queue() {} };
      MathJax.startup.defaultReady();
    },
  },
});
