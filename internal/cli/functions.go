package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

func (a *app) list() *cobra.Command {
	var out format
	c := &cobra.Command{
		Use: "list", Aliases: []string{"ls", "functions"}, Short: "List functions", Args: takes(0, 0, ""),
		Example: "  hearth list\n  hearth list -o json",
		RunE: func(c *cobra.Command, _ []string) error {
			list, err := a.functionList(c.Context())
			if err != nil {
				return err
			}
			if out == formatJSON {
				return a.printJSON(messages(list))
			}
			rows := [][]string{{"NAME", "REVISION", "READY", "STARTING", "DESIRED", "AGE", "RUNS", "REASON"}}
			for _, f := range list {
				s := f.GetStatus()
				rows = append(rows, []string{
					f.GetName(), dash(s.GetRevision()), fmt.Sprint(s.GetReady()), fmt.Sprint(s.GetStarting()), fmt.Sprint(s.GetDesired()),
					age(s.GetCreatedAt().AsTime(), time.Now()), runs(f.GetSpec()), firstLine(s.GetReason()),
				})
			}
			return a.table(rows)
		},
	}
	out.add(c.Flags())
	return c
}

func (a *app) ps() *cobra.Command {
	var out format
	c := &cobra.Command{
		Use: "ps [NAME]", Short: "List instances, all of them or a function's", Args: takes(0, 1, "at most the function's NAME"),
		Example: "  hearth ps\n  hearth ps hello -o json", ValidArgsFunction: a.completeFunction,
		RunE: func(c *cobra.Command, args []string) error {
			name := strings.Join(args, "")
			if out == formatTable {
				return a.printInstances(c.Context(), name)
			}
			list, err := a.instanceList(c.Context(), name)
			if err != nil {
				return err
			}
			return a.printJSON(messages(list))
		},
	}
	out.add(c.Flags())
	return c
}

func (a *app) printInstances(ctx context.Context, function string) error {
	list, err := a.instanceList(ctx, function)
	if err != nil {
		return err
	}
	rows := [][]string{{"INSTANCE", "STATE", "DEGREE", "RUNTIME", "FUNCTION", "REVISION", "ADDRESS", "POD", "AGE", "NODE"}}
	for _, i := range list {
		rows = append(rows, []string{
			i.GetId(), stateName(i.GetState()), degreeName(i.GetDegree()), dash(i.GetRuntime()), dash(i.GetFunction()), dash(i.GetRevision()), dash(i.GetAddress()), dash(sharedPod(i)),
			age(i.GetCreatedAt().AsTime(), time.Now()), dash(i.GetNode()),
		})
	}
	return a.table(rows)
}

// sharedPod names the pod of an Instance that may have others beside it; those with the same are in one.
func sharedPod(i *hearthv1.Instance) string {
	if i.GetGroup() == "" {
		return ""
	}
	return i.GetPod()
}

// noFunction is the error of a Function that is not there, as a deployment would have it.
func noFunction(name string) error {
	return &spoken{
		text: "there is no function " + name + "; see `hearth list`", err: connect.NewError(connect.CodeNotFound, errors.New("no such function")),
	}
}

// runs is what a Function is made of, in a word or three.
func runs(spec *hearthv1.FunctionSpec) string {
	if spec.GetRuntime() == "" {
		return spec.GetImage()
	}
	return strings.TrimSpace(spec.GetRuntime() + " " + spec.GetCode().GetHandler())
}

// firstLine keeps a trace out of a table.
func firstLine(text string) string {
	first, _, several := strings.Cut(printable(text), "\n")
	if several {
		return first + " …"
	}
	return first
}

// degreeName is a degree as people say it. Nodes from before there were several say none.
func degreeName(d hearthv1.Degree) string {
	if d == hearthv1.Degree_DEGREE_UNSPECIFIED {
		d = hearthv1.Degree_DEGREE_SANDBOX
	}
	return strings.ToLower(strings.TrimPrefix(d.String(), "DEGREE_"))
}

// stateName is a state as people say it: warm, serving, …
func stateName(s hearthv1.State) string {
	return strings.ToLower(strings.TrimPrefix(s.String(), "STATE_"))
}

func (a *app) delete() *cobra.Command {
	return &cobra.Command{
		Use: "delete NAME", Aliases: []string{"rm"}, Short: "Delete a function and end its instances",
		Args: takes(1, 1, "the function's NAME"), ValidArgsFunction: a.completeFunction, Example: "  hearth delete hello",
		RunE: func(c *cobra.Command, args []string) error {
			d, err := a.deployment()
			if err != nil {
				return err
			}
			if err := d.DeleteFunction(c.Context(), args[0]); err != nil {
				return a.explain(err, "delete "+args[0])
			}
			a.note("%s is deleted.", args[0])
			return nil
		},
	}
}

func (a *app) logs() *cobra.Command {
	req := &hearthv1.LogsRequest{}
	c := &cobra.Command{
		Use: "logs NAME", Short: "Print what a function's instances have written", Args: takes(1, 1, "the function's NAME"),
		Long:    "Prints the output of a function's instances, those that ended included as long as their logs are kept. Each line begins with\nits instance, unless --instance names one.",
		Example: "  hearth logs hello --tail 20\n  hearth logs hello -f", ValidArgsFunction: a.completeFunction,
		RunE: func(c *cobra.Command, args []string) error {
			req.Function = args[0]
			d, err := a.deployment()
			if err != nil {
				return err
			}
			err = d.Logs(c.Context(), req, func(line *hearthv1.LogsResponse) error { return a.printLine(line, req.GetInstanceId() == "") })
			if err != nil {
				return a.explain(err, "logs of "+args[0])
			}
			return nil
		},
	}
	c.Flags().BoolVarP(&req.Follow, "follow", "f", false, "go on with what is written from now on")
	c.Flags().Int32Var(&req.Tail, "tail", 0, "begin with this many of the last lines (default all)")
	c.Flags().StringVar(&req.InstanceId, "instance", "", "only this instance; see `hearth ps`")
	return c
}

func (a *app) printLine(m *hearthv1.LogsResponse, prefix bool) error {
	if prefix {
		return a.printf("%s | %s\n", m.GetInstanceId(), m.GetLine())
	}
	return a.printf("%s\n", m.GetLine())
}
