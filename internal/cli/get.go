package cli

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

func (a *app) get() *cobra.Command {
	var out format
	c := &cobra.Command{
		Use: "get NAME", Aliases: []string{"describe"}, Short: "Show a function: what it runs, how it stands, and its instances",
		Args: takes(1, 1, "the function's NAME"), ValidArgsFunction: a.completeFunction, Example: "  hearth get hello\n  hearth get hello -o json",
		RunE: func(c *cobra.Command, args []string) error {
			list, err := a.functionList(c.Context())
			if err != nil {
				return err
			}
			i := slices.IndexFunc(list, func(f *hearthv1.Function) bool { return f.GetName() == args[0] })
			if i < 0 {
				return noFunction(args[0])
			}
			if out == formatJSON {
				return a.printJSON(message(list[i]))
			}
			if err := a.describe(list[i]); err != nil {
				return err
			}
			return a.printInstances(c.Context(), args[0])
		},
	}
	out.add(c.Flags())
	return c
}

// describe prints a Function, a line for each thing that was said of it.
func (a *app) describe(f *hearthv1.Function) error {
	spec, s := f.GetSpec(), f.GetStatus()
	rows := [][]string{
		{"Name:", f.GetName()}, {"Runs:", runs(spec)}, {"Package:", spec.GetCode().GetPackage()}, {"Command:", strings.Join(append(slices.Clone(spec.GetCommand()), spec.GetArgs()...), " ")},
		{"Environment:", strings.Join(slices.Sorted(maps.Keys(spec.GetEnv())), ", ")}, {"Secrets:", strings.Join(slices.Sorted(maps.Keys(spec.GetSecrets())), ", ")},
		{"Hosts:", strings.Join(spec.GetHosts(), ", ")}, {"Tenant:", spec.GetTenant()}, {"Group:", spec.GetGroup()}, {"Limits:", limits(spec.GetResources())},
		{"Scaling:", bounds(spec.GetScaling())}, {"Revision:", s.GetRevision()},
		{"Instances:", fmt.Sprintf("%d ready, %d starting, %d desired", s.GetReady(), s.GetStarting(), s.GetDesired())},
		{"Reason:", strings.ReplaceAll(printable(s.GetReason()), "\n", "\n\t")}, {"Age:", age(s.GetCreatedAt().AsTime(), time.Now())},
	}
	return a.table(slices.DeleteFunc(rows, func(row []string) bool { return row[1] == "" }))
}

func limits(r *hearthv1.Resources) string {
	var parts []string
	if r.GetMemoryBytes() > 0 {
		parts = append(parts, "memory "+megabytes(r.GetMemoryBytes()))
	}
	if r.GetCpuMillis() > 0 {
		parts = append(parts, fmt.Sprintf("%g cores", float64(r.GetCpuMillis())/1000))
	}
	return strings.Join(parts, ", ")
}

// bounds are what is said of scaling; what is not is the default.
func bounds(s *hearthv1.Scaling) string {
	var parts []string
	for _, b := range []struct {
		name  string
		value int32
	}{{"min", s.GetMin()}, {"max", s.GetMax()}, {"concurrency", s.GetConcurrency()}, {"queue", s.GetQueue()}, {"frozen", s.GetFrozen()}} {
		if b.value != 0 {
			parts = append(parts, fmt.Sprintf("%s %d", b.name, b.value))
		}
	}
	if d := s.GetWindow(); d != nil {
		parts = append(parts, "window "+d.AsDuration().String())
	}
	if d := s.GetGrace(); d != nil {
		parts = append(parts, "grace "+d.AsDuration().String())
	}
	return strings.Join(parts, ", ")
}
