"""Plots of the example model's stories, in a small notation.

    # topic       starts a plot; the topic is how a user would name it
    - sentence    one sentence of the story
    ? sentence    a sentence that is left out half of the time
    > sentence    the plot's own ending
    | sentence    another way to say the line above

Fields in braces are attributes of the scene (see `tiny_cast.py`): h hero, f friend, t and u
things, s everything else. Names, pronouns and things agree throughout a story, so a model has to
look back to tell it well.
"""

OPENING = """
- Once upon a time, there was {s.hero_with_mood} named {h.name}.
| Once there was {s.hero_with_mood} named {h.name}.
| There once was {s.hero_with_mood} named {h.name} who lived {s.home}.
| Once upon a time, {s.hero_with_mood} named {h.name} lived {s.home}.
"""

ENDING = """
- {h.name} and {f.name} were happy for the rest of the day.
| From that day on, {h.name} and {f.name} were the best of friends.
| That night, {h.name} fell asleep with a smile.
| And they all went home happy.
"""

PLOTS = """
# a lost {t.name}
- {h.name} had {t.a_full} and loved it very much.
| {h.He} had {t.a_full} that {h.he} took everywhere.
- One {s.time}, the {t.name} was gone.
| One {s.time}, {h.name} could not find the {t.name}.
? {h.name} was very sad.
| "Where is my {t.name}?" cried {h.name}.
- {h.He} asked {h.his} friend {f.who} for help.
| {f.who} came by and said, "Do not cry. I will help you look."
- They looked {s.first_hiding}, but the {t.name} was not there.
- Then {f.name} looked {s.second_hiding}, and there it was!
| Then they looked {s.second_hiding}, and there was the {t.full}!
- "Thank you, {f.name}!" said {h.name} and gave {f.him} a big hug.
| "You found it!" said {h.name}. "Thank you so much."
> {h.name} never lost the {t.name} again.
| Then they played with the {t.name}.

# sharing
- One {s.time}, {h.name} had a big {s.food} for lunch.
| One {s.time}, {h.his} mother gave {h.him} a big {s.food}.
- {h.He} sat down {s.place} to eat it.
- Then {f.who} came along and looked very hungry.
| Next to {h.him} sat {f.who}, who had nothing to eat.
? "I am so hungry," said {f.name}.
| {f.name} looked at the {s.food}.
- {h.name} thought for a moment and cut the {s.food} in two.
| At first {h.name} wanted to keep it all, but then {h.he} cut it in two.
- "Here, half of it is for you," {h.he} said.
| "You can have half of my {s.food}," said {h.name}.
- {f.name} smiled. "You are very kind, {h.name}!"
| "Thank you!" said {f.name}, and they ate together.
> The {s.food} tasted even better because they shared it.
| Sharing made them both happy.

# helping others
- One {s.time}, {h.name} went for a walk {s.place} with {h.his} friend {f.name}.
- Suddenly they heard a small voice. "Help! Help!"
| Then they heard somebody cry. "Please help me!"
- It was a {s.small_animal} that {s.trouble}.
? "Do not be afraid," said {h.name}.
| "We must do something!" said {f.name}.
- {h.name} took the {s.small_animal} in {h.his} arms, and {f.name} gave it some water.
| {f.name} ran to get help, and {h.name} stayed with the {s.small_animal}.
| {h.name} and {f.name} worked together until the {s.small_animal} was safe.
- Soon the {s.small_animal} felt better.
| Soon the {s.small_animal} was happy again.
- "Thank you," said the {s.small_animal}. "You are my heroes!"
| The {s.small_animal} thanked them both.
> Every day after that, the {s.small_animal} came to say hello.
| It felt good to help.

# a rainy day
- One {s.time}, {h.name} wanted to play {s.place}.
- But it began to rain.
| But the sky was dark and it rained and rained.
? "Now I cannot go out," said {h.name}.
| {h.name} looked out of the window and sighed.
- Then there was a knock at the door. It was {f.who}.
- "Let us play inside," said {f.name}. "Look, I have {t.a_full}!"
| "I have an idea," said {f.name} and showed {h.him} {t.a_full}.
- They played with the {t.name} and built a house out of blankets.
| They put the {t.name} on the table and made up a game.
- When the rain stopped, they did not even notice.
| Outside it rained, but inside they laughed.
> "I like rainy days," said {h.name}.
| It was the best rainy day ever.

# learning something new
- {h.name} wanted to learn to {s.skill}, but it was hard.
- {h.He} tried once and it did not work.
| The first time went very badly.
? "I will never learn it," said {h.name}.
| {h.name} wanted to give up.
- {f.who} saw it and said, "Try again. I will show you how."
| But {f.who} said, "Do not give up. Try again tomorrow."
- So {h.name} tried again and again, every day.
| They practiced together {s.place}, day after day.
- At last, {h.name} could {s.skill}!
| And one {s.time}, {h.he} could {s.skill}!
- "I did it!" {h.he} cried.
| "Look at me!" shouted {h.name}. "I can do it!"
> {f.name} was very proud of {h.him}.
| {h.name} was glad that {h.he} tried.

# a cake
- One {s.time}, {h.name} wanted to bake a cake for {h.his} {s.parent}.
- {f.who} came to help.
- They took flour, butter and sugar.
| They put flour and sugar into a big bowl.
- "Oh no," said {h.name}. "We have no {s.missing}!"
| "Oh no," said {f.name}. "We have no {s.missing}!"
- So they went to the old {s.giver} and asked nicely.
- "Of course you can have some {s.missing}," said the {s.giver}.
- Soon the cake was in the oven.
| They mixed it all and baked the cake.
- It smelled so good!
| The whole house smelled sweet.
- They gave the {s.giver} a big piece, too.
| {h.name} gave the first piece to {f.name} and the second to the {s.giver}.
> It was the best cake in the world.
| Everybody said that the cake was very good.

# a noise in the night
- One night, {h.name} could not sleep.
| One night, {h.name} woke up in the dark.
- {s.sound}! There was a strange noise outside.
| {s.sound}! There was a strange noise at the window.
- {h.name} was afraid.
| "Who is there?" whispered {h.name}.
- {h.He} held {h.his} {t.full} very tight.
| But {h.he} went to look.
- The noise came again.
| {s.sound}! There it was again.
- Then {h.he} saw who it was. It was {f.who}!
| It was not a monster at all. It was only {f.who}!
- "I am sorry," said {f.name}. "I was looking for my {u.name}."
| "I was cold outside," said {f.name}. "Can I come in?"
- {h.name} laughed.
| "You scared me!" said {h.name}, and they both laughed.
> After that, {h.name} was not afraid of the dark.
| Then they both slept well.

# a birthday
- Tomorrow was the birthday of {h.his} friend {f.who}.
- {h.name} wanted to give {f.him} a present, but {h.he} had no money.
| "What can I give {f.him}?" thought {h.name}.
- So {h.he} sat down and made {t.a_full}.
| {h.He} worked all day and made {t.a_full}.
? The {t.name} was not perfect, but it was pretty.
| It was a lot of work.
- The next day, {f.name} opened the box and found the {t.name}.
| At the party, {h.name} gave {f.him} the {t.name}.
- "You made it for me?" asked {f.name}. "It is the best present of all!"
| "What a nice {t.name}!" cried {f.name}. "I love it!"
> {f.name} kept the {t.name} forever.
| Then they ate cake and played {s.place}.

# two friends who fight
- One {s.time}, {h.name} and {f.who} found {t.a_full} {s.place}.
- "It is mine!" said {h.name}. "No, it is mine!" said {f.name}.
- They both pulled at the {t.name} until it broke.
| They were so angry that they dropped the {t.name}, and it broke.
- Now nobody could play with it.
| Then it was very quiet.
- "I am sorry," said {h.name}.
| {h.name} began to cry. "I am sorry," {h.he} said.
- "I am sorry, too," said {f.name}.
| "Me, too," said {f.name}. "Let us fix it."
- They fixed the {t.name} together and took turns.
| Together they fixed the {t.name}, and then they played with it together.
> They never fought about it again.
| It is more fun to share.

# a seed
- One {s.time}, {f.who} gave {h.him} a tiny seed.
- "What is it?" asked {h.name}. "Wait and see," said {f.name}.
| "What will it be?" asked {h.name}. "You will see," said {f.name}.
- {h.name} put the seed into the ground {s.place} and gave it water every day.
- For a long time, nothing happened.
| One day passed, and then another.
? "Maybe it is asleep," said {h.name}.
| But {h.name} did not give up.
- Then a small green leaf came out!
| Then, one morning, there was a green leaf!
- It grew and grew until it was a big, beautiful {s.plant}.
- "Look, {f.name}!" cried {h.name}.
| {h.name} ran to show it to {f.name}.
> {h.name} learned that good things take time.
| They sat by the {s.plant} all day.

# building a {s.made}
- One {s.time}, {h.name} said, "I want to build a {s.made}."
- "I will help you," said {f.who}.
| {h.His} friend {f.name} came to help.
- They found {s.parts} and went to work.
- The first {s.made} broke at once.
| The first {s.made} was much too small.
? "That is not so bad," said {f.name}. "We know more now."
- So they built another one, and it was better.
| They tried again, and this time it was right.
- They {s.trial}.
- "We built it together!" said {h.name}.
| "It works!" cried {f.name}.
> It was the best {s.made} they ever had.
| The next day, they painted the {s.made}.

# a new friend
- One {s.time}, {h.he} saw {f.a_kind} sitting all alone {s.place}.
- "Hello, my name is {h.name}," {h.he} said. "What is your name?"
| "Who are you?" asked {h.name}.
- "I am {f.name}," said the {f.kind} very quietly.
| "{f.name}," said the shy {f.kind}.
- "I am new here and have no friends."
| "I do not know anybody here," said {f.name}.
- {h.name} smiled and gave {f.him} {h.his} {t.full}.
| "Then come and play with my {t.full}," said {h.name}.
- They played with the {t.name} until the sun went down.
- "Will you come again?" asked {f.name}.
| "Can we play again tomorrow?" asked {f.name}.
- "Yes, of course!" said {h.name}.
| "Every day!" said {h.name}.
> Now {f.name} was not alone any more.
| That is how {h.name} made a new friend.

# a sick friend
- One {s.time}, {h.name} waited for {h.his} friend {f.name}, but {f.he} did not come.
- {h.name} went to {f.his} house.
| "Where is {f.name}?" thought {h.name}.
- {f.name} was in bed, sick and sad.
- "My head hurts," said {f.name}.
| "I cannot come out and play," said {f.name}.
- {h.name} made some warm soup and brought {f.him} {s.a_food}.
| So {h.name} brought {f.him} warm tea and {s.a_food}.
- Then {h.he} read {f.him} a book.
| Then {h.he} told {f.him} a funny story.
- The next day, {f.name} felt much better.
| After two days, {f.name} was well again.
- "You are a good friend, {h.name}," {f.he} said.
| "Thank you, {h.name}," said {f.name}.
> They ran outside to play {s.place}.
| A good friend is the best medicine.

# a race
- One {s.time}, there was a big race {s.place}.
- {h.name} wanted to win.
| "I will be the first!" said {h.name}.
- {h.He} ran as fast as {h.he} could, and {f.who} ran next to {h.him}.
- Suddenly {f.name} fell and hurt {f.his} knee.
| Then {f.name} fell over a stone.
- {h.name} stopped.
| {h.name} could see the end of the race, but {h.he} stopped.
- "Are you hurt?" {h.he} asked.
| "Take my hand," said {h.name}.
- They walked to the end together, slowly, and came in last.
- But everybody cheered for them.
| But all the others clapped and cheered.
> "You are my hero," said {f.name}.
| {h.name} did not win, but {h.he} was happy.

# the moon
- One night, {h.name} looked up at the big, round moon.
- "I want to touch it," {h.he} said to {h.his} friend {f.who}.
- So they walked to the top of the highest hill.
| So they took a ladder and climbed up on the roof.
- But the moon was still too far away.
| {h.name} put up {h.his} hand, but the moon was too far away.
? "Do not be sad," said {f.name}.
- Then {f.name} had an idea and showed {h.him} the lake.
| "Come with me to the lake," said {f.name}.
- There was the moon, in the water!
- {h.name} put a hand into the water and touched it.
| Very softly, {h.name} touched the moon in the water.
> "Good night, moon," said {h.name}.
| They sat by the water and looked at the stars.

# a treasure
- One {s.time}, {h.name} found an old map {s.place}.
- "It shows a treasure!" {h.he} said and ran to {f.who}.
- They followed the map over the bridge and past the old mill.
| They followed the map through the forest and over the river.
- The treasure had to be {s.first_hiding}.
- They looked there, and they found a box.
| They looked and looked, and at last they found a box.
- Inside was {t.a_full} and a letter.
- The letter said, "The best treasure is a good friend."
| The letter said, "Take good care of it, and of each other."
? "That is true," said {f.name}.
> They put the box back for the next one to find.
| {h.name} and {f.name} kept the {t.name} for a long time.
"""
