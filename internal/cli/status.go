package cli

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/internal/stack"
)

// statusJSON is what status -o json prints.
type statusJSON struct {
	*stack.Status
	Warm      int               `json:"warm"`
	Degrees   map[string]int    `json:"warm_by_degree"`
	Serving   int               `json:"serving"`
	Frozen    int               `json:"frozen"`
	Functions []json.RawMessage `json:"functions"`
	Instances []json.RawMessage `json:"instances"`
}

func (a *app) status() *cobra.Command {
	var out format
	c := &cobra.Command{
		Use: "status", Short: "Show which deployment this is, its daemons, the pool and how many functions there are", Args: takes(0, 0, ""),
		Example: "  hearth status\n  hearth status --context production\n  hearth status -o json",
		RunE: func(c *cobra.Command, _ []string) error {
			onCluster, err := a.onCluster()
			if err != nil {
				return err
			}
			if onCluster {
				return a.clusterStatus(c.Context(), out)
			}
			s, err := stack.Inspect(c.Context(), a.run)
			if err != nil {
				return err
			}
			functions, err := a.functionList(c.Context())
			if err == nil {
				var list []*hearthv1.Instance
				if list, err = a.instanceList(c.Context(), ""); err == nil {
					return a.printStatus(s, functions, list, out)
				}
			}
			if printed := a.printStatus(s, nil, nil, out); printed != nil {
				return printed
			}
			return err
		},
	}
	out.add(c.Flags())
	return c
}

func (a *app) printStatus(s *stack.Status, functions []*hearthv1.Function, list []*hearthv1.Instance, out format) error {
	n := count(list)
	if out == formatJSON {
		return a.printJSON(statusJSON{
			Status: s, Warm: n.states[hearthv1.State_STATE_WARM], Degrees: n.degrees, Serving: n.states[hearthv1.State_STATE_SERVING],
			Frozen: n.states[hearthv1.State_STATE_FROZEN], Functions: messages(functions), Instances: messages(list),
		})
	}
	if err := a.printf("Deployment %s is %s at %s; data in %s\n", s.Name, s.State, s.Gateway, s.Root); err != nil {
		return err
	}
	if s.Registry != "" {
		if err := a.printf("Registry at %s\n", s.Registry); err != nil {
			return err
		}
	}
	if err := a.printf("containerd %s, instances in %s\n\n", s.Containerd, s.Subnet); err != nil {
		return err
	}
	rows := [][]string{{"DAEMON", "PID", "READY", "RESTARTS", "UP", "REASON"}}
	for _, d := range s.Daemons {
		pid, up := "-", "-"
		if d.PID > 0 {
			pid, up = strconv.Itoa(d.PID), age(d.Started, time.Now())
		}
		reason := d.Reason
		if reason == "" && !d.Ready {
			reason = d.Error
		}
		rows = append(rows, []string{d.Name, pid, yesNo(d.Ready), strconv.Itoa(d.Restarts), up, reason})
	}
	if err := a.table(rows); err != nil {
		return err
	}
	return a.printf("\n%s, %s\n", plural(len(functions), "function"), n.sentence(s.PoolSize))
}

// census counts Instances: by state, and the warm ones by degree and by Runtime.
type census struct {
	states   map[hearthv1.State]int
	degrees  map[string]int
	runtimes map[string]int
}

func count(list []*hearthv1.Instance) census {
	n := census{map[hearthv1.State]int{}, map[string]int{}, map[string]int{}}
	for _, i := range list {
		n.states[i.GetState()]++
		if i.GetState() != hearthv1.State_STATE_WARM {
			continue
		}
		n.degrees[degreeName(i.GetDegree())]++
		if i.GetRuntime() != "" {
			n.runtimes[i.GetRuntime()]++
		}
	}
	return n
}

// sentence says how many are warm, serving and frozen.
func (n census) sentence(sandboxes int) string {
	return fmt.Sprintf("%d warm of %d wanted%s", n.degrees[degreeName(hearthv1.Degree_DEGREE_SANDBOX)], sandboxes, n.rest())
}

// onNodes is sentence where WarmPools say how many are wanted.
func (n census) onNodes() string {
	return fmt.Sprintf("%s warm sandboxes%s", strconv.Itoa(n.degrees[degreeName(hearthv1.Degree_DEGREE_SANDBOX)]), n.rest())
}

func (n census) rest() (text string) {
	for _, name := range slices.Sorted(maps.Keys(n.runtimes)) {
		text += fmt.Sprintf(", %d warm %s", n.runtimes[name], name)
	}
	return fmt.Sprintf("%s, %d serving, %d frozen", text, n.states[hearthv1.State_STATE_SERVING], n.states[hearthv1.State_STATE_FROZEN])
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
