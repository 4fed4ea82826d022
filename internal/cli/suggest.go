package cli

import (
	"context"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

const (
	// leastSaving of an average start is what makes a module worth the memory that it takes in every warm instance.
	leastSaving  = time.Millisecond
	maxProposals = 50
)

const suggestRuntimeLong = `Says what functions import while they are loaded that their runtime has not preloaded, by the account of its loader in each start since
the nodes' agents began, and which of that to preload. SECONDS is what a start spends that imports the module, SAVES what preloading it
would save of an average start of the runtime. Only what the runtime's image has can be preloaded: what comes with a function's code
cannot, unless you put it into the image. What is preloaded takes memory in every instance that waits. Only python's loader tells this.`

// suggestion is what suggest prints of a Runtime.
type suggestion struct {
	Runtime    string             `json:"runtime"`
	Generation int64              `json:"generation"`
	Starts     int64              `json:"starts"`
	Functions  int                `json:"functions"`
	Modules    []suggestionModule `json:"modules"`
	// Preload is the whole list to apply: what there is with what is proposed.
	Preload []string `json:"preload"`
}

type suggestionModule struct {
	Name      string  `json:"name"`
	Functions int     `json:"functions"`
	Starts    int64   `json:"starts"`
	Seconds   float64 `json:"seconds"`
	Saves     float64 `json:"saves"`
	InImage   bool    `json:"in_image"`
	Proposed  bool    `json:"proposed"`
}

func (a *app) suggestRuntime() *cobra.Command {
	var out format
	c := &cobra.Command{
		Use: "suggest [NAME]", Short: "Propose what a runtime should preload", Long: suggestRuntimeLong, Args: takes(0, 1, "the runtime's NAME, or nothing for all"),
		Example: "  hearth runtime suggest\n  hearth runtime suggest python -o json", ValidArgsFunction: a.completeRuntime,
		RunE: func(c *cobra.Command, args []string) error {
			return a.runSuggestRuntime(c.Context(), strings.Join(args, ""), out)
		},
	}
	out.add(c.Flags())
	return c
}

func (a *app) runSuggestRuntime(ctx context.Context, name string, out format) error {
	d, err := a.deployment()
	if err != nil {
		return err
	}
	told, err := d.Imports(ctx, name)
	if err != nil {
		return a.explainRuntime(err, "ask what functions import")
	}
	list, err := d.Runtimes(ctx)
	if err != nil {
		return a.explain(err, "list runtimes")
	}
	if told.GetSilent() > 0 {
		a.note("%s did not answer: what functions import there is left out", plural(int(told.GetSilent()), "node"))
	}
	all := []suggestion{}
	for _, r := range told.GetRuntimes() {
		if n := slices.IndexFunc(list, func(l *hearthv1.Runtime) bool { return l.GetName() == r.GetRuntime() }); n >= 0 && r.GetStarts() > 0 {
			s := suggest(r, list[n].GetPreload())
			all = append(all, s)
			if out == formatJSON {
				continue
			}
			if err := a.printSuggestion(s, list[n]); err != nil {
				return err
			}
		}
	}
	switch {
	case out == formatJSON:
		return a.printJSON(all)
	case len(all) == 0:
		a.note("No start has told yet what it imports: it does so a second after it is ready, in a runtime whose loader can")
	}
	return nil
}

// suggest decides what a Runtime should preload besides what it does.
func suggest(r *hearthv1.RuntimeImports, preload []string) suggestion {
	s := suggestion{Runtime: r.GetRuntime(), Generation: r.GetGeneration(), Starts: r.GetStarts(), Functions: len(r.GetFunctions()), Preload: slices.Clone(preload)}
	for _, m := range r.GetModules() {
		total := m.GetTotal().AsDuration()
		saves := total / time.Duration(max(1, r.GetStarts()))
		proposed := m.GetInImage() && saves >= leastSaving && len(s.Preload) < len(preload)+maxProposals && !slices.Contains(preload, m.GetName())
		if proposed {
			s.Preload = append(s.Preload, m.GetName())
		}
		s.Modules = append(s.Modules, suggestionModule{
			Name: m.GetName(), Functions: len(m.GetFunctions()), Starts: m.GetStarts(), Seconds: total.Seconds() / float64(max(1, m.GetStarts())),
			Saves: saves.Seconds(), InImage: m.GetInImage(), Proposed: proposed,
		})
	}
	return s
}

func (a *app) printSuggestion(s suggestion, r *hearthv1.Runtime) error {
	if err := a.printf("Runtime %s, generation %d: %s of %s\n", s.Runtime, s.Generation, plural(int(s.Starts), "start"), plural(s.Functions, "function")); err != nil {
		return err
	}
	rows := [][]string{{"MODULE", "FUNCTIONS", "STARTS", "SECONDS", "SAVES", "IN IMAGE", "PRELOAD"}}
	for _, m := range s.Modules {
		rows = append(rows, []string{
			printable(m.Name), fmt.Sprint(m.Functions), fmt.Sprint(m.Starts), fmt.Sprintf("%.4f", m.Seconds), fmt.Sprintf("%.4f", m.Saves), yesNo(m.InImage), yesNo(m.Proposed),
		})
	}
	if err := a.table(rows); err != nil {
		return err
	}
	if len(s.Preload) == len(r.GetPreload()) {
		return a.printf("\nThere is nothing to add to what it preloads.\n\n")
	}
	words := []string{"hearth", "runtime", "apply", r.GetName(), "--image", r.GetImage(), "--preload", strings.Join(s.Preload, ",")}
	if r.GetWarm() > 0 {
		words = append(words, "--warm", fmt.Sprint(r.GetWarm()))
	}
	for _, name := range slices.Sorted(maps.Keys(r.GetEnv())) {
		words = append(words, "--env", name+"="+r.GetEnv()[name])
	}
	return a.printf("\npreload: [%s]\n  %s\n\n", strings.Join(s.Preload, ", "), shellCommand(words))
}

var plainWord = regexp.MustCompile(`^[A-Za-z0-9@%+=:,./_-]+$`)

// shellCommand writes a command as a shell reads it: some of its words are foreign.
func shellCommand(words []string) string {
	words = slices.Clone(words)
	for n, w := range words {
		if !plainWord.MatchString(w) {
			words[n] = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
		}
	}
	return strings.Join(words, " ")
}
